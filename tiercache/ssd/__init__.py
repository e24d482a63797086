"""The SSD tier: aligned records in preallocated segment files, packed facts rows in RocksDB, space back by segment."""
