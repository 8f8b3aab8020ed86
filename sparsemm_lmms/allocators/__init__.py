"""How many tokens each kv head keeps: one file an allocator, found by its name (`registry`)."""
