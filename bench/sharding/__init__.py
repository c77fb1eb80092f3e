"""Memory and sampling of sharded policies."""
