package persysv1

import _ "embed"

// OpenAPI is the description of the REST API, generated from the annotations of
// api.proto.
//
//go:embed persys.swagger.json
var OpenAPI []byte
