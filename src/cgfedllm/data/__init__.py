"""Data: where rows come from, who gets them, and how they become tokens.

Importing this room imports neither torch nor `datasets`; `batching` does, and is apart.
"""

from cgfedllm.data.encoding import EncodedRows, Example, RowEncoder
from cgfedllm.data.federated import (
    ClientData,
    ClientSizes,
    FederatedData,
    load_federated_data,
    load_own_data,
)
from cgfedllm.data.rows import Row, SourceFile
from cgfedllm.data.sources import load_sources

__all__ = [
    "ClientData",
    "ClientSizes",
    "EncodedRows",
    "Example",
    "FederatedData",
    "Row",
    "RowEncoder",
    "SourceFile",
    "load_federated_data",
    "load_own_data",
    "load_sources",
]
