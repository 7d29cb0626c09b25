"""The client's side: the listener, the chat path, the API's other paths, errors, and the admin listener."""
