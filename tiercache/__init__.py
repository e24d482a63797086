"""tiercache: one embeddable tiered cache for KV blocks of language models and pages of data-lake files."""

__version__ = "0.1.0"
