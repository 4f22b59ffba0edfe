"""The HTTP API: endpoints, schemas and the OpenAPI document. No SQL, no tensors."""
