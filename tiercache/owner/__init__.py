"""The owner of a shared directory: a small process with its index, its memory, its SSD and a door, and no user code.

`python -m tiercache.owner DIR` is started by the first process that opens a directory (see wire/starting.py) and goes
some seconds after its last client. `state` is what it leaves for the next one in case it dies, `adoption` how that one
takes over, `process` what it leaves behind of whoever started it, `life` everything in between.
"""
