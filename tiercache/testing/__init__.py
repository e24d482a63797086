"""What tests of tiercache, and of tiers, policies and origins that others write, are made of.

Simulation: `simloop` (deterministic loop), `simdisk` (disk with power cuts). Faults: `faults` (wrappers of the ports),
`faultproxy` (HTTP). Truth: `model` (a dictionary that may forget). Contract suites: `tiers`, `origins`.
Servers: `s3server`.
"""
