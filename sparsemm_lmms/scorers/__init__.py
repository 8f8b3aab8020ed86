"""How much each token of a prompt matters to each kv head: one file a scorer, found by its name (`registry`)."""
