"""Tables for those who have pandas, which this package does not need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from airllm_nb.errors import AirLLMError


def data_frame(columns: Mapping[str, Sequence[Any]], otherwise: str) -> Any:
    """Return columns as a ``pandas.DataFrame``.

    Raises
    ------
    AirLLMError
        If pandas is not installed; the remedy names what can be used `otherwise`.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise AirLLMError("pandas is not installed.", f"Run  %pip install pandas  , or use {otherwise}.") from error
    return pd.DataFrame(columns)
