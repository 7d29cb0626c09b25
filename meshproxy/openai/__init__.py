"""OpenAI's and Mesh's formats: requests, event streams, usage, errors, headers. No I/O."""
