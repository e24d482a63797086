"""Mooncake's package for engines that are to use tiercache: `store` is ours, anything else an installed Mooncake's."""

from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)
