"""The namespace: inodes, entries, sessions and their rules, as functions over one transaction of kvfs.meta.kv."""
