"""Images as files: what they are, how a seed is made, how names change hands."""
