"""Graph edits that several passes share."""
