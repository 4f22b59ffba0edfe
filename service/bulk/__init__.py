"""Millions of crops: their features computed offline into Parquet files, and loaded into a gallery.

`features` is what the files hold, `embedding` writes them, `ray_engine` does so on a cluster,
`importing` adds them to a gallery.
"""
