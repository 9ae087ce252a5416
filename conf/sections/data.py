"""`data`: What a client trains on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from conf import rules
from conf.rules import ConfigError, one_of, setting
from conf.sections.base import Section

FORMATS = ("auto", "text", "prompt", "messages", "sharegpt", "alpaca")
_TAKES_PROMPTS, _TAKES_MESSAGES = ("auto", "prompt"), ("auto", "messages", "sharegpt")


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """What a client trains on.

    In deployment `--node-config "data-path=..."` names a node's own file instead of `path`.
    """

    section: ClassVar[str] = "data"

    source: str = setting("builtin", one_of("builtin", "files", "hub"))
    """builtin (English text of `pydoc_data.topics`), files, or hub."""
    path: str = ""
    """files: a file or folder (jsonl, csv, parquet, txt); hub: a data set id."""
    name: str = ""
    """hub: the configuration of the data set, if it has several."""
    split: str = setting("train", rules.NOT_EMPTY)
    """hub: the split to read."""
    format: str = setting("auto", one_of(*FORMATS))
    """What a row is: text, prompt (with completion), messages, sharegpt (`conversations` of
    from/value), alpaca (`instruction`, `input`, `output`); auto: what its columns say."""
    text_column: str = setting("text", rules.NOT_EMPTY)
    """Column of plain text; not used with prompts or messages."""
    prompt_column: str = ""
    """With `completion_column`: prompt tokens are masked from the loss."""
    completion_column: str = ""
    """What is learned after the prompt; both are joined as they are, without a separator."""
    messages_column: str = ""
    """Chat messages, rendered with the tokenizer's chat template; assistant turns are learned."""
    partitioner: str = setting(
        "iid", one_of("iid", "natural", "dirichlet", "linear", "square", "exponential")
    )
    """iid, natural (no value of `partition_by` at two clients), dirichlet (uneven mixtures of its
    values), or sizes that grow with the client's number: linear, square, exponential."""
    partition_by: str = ""
    """Column for natural and dirichlet; builtin: `topic` if empty."""
    alpha: float = setting(0.5, rules.POSITIVE)
    """dirichlet: concentration; smaller is more uneven."""
    context: int = setting(128, rules.CONTEXT)
    """Most tokens in one example."""
    overlong: str = setting("chunk", one_of("chunk", "truncate", "refuse"))
    """A text longer than the context: chunk, truncate or refuse."""
    heldout: float = setting(0.1, rules.UP_TO_HALF)
    """Share of each client's examples kept for evaluation, in [0, 0.5]."""
    central_path: str = ""
    """A file or folder on the server, read like `path`, on which it evaluates the whole averaged
    model after every round; empty: no central evaluation."""
    max_examples: int = setting(0, rules.COUNT_OR_ZERO)
    """Read at most this many examples per client, held-out ones included; 0: all."""

    def _check_together(self) -> None:
        if bool(self.prompt_column) != bool(self.completion_column):
            missing = "completion_column" if self.prompt_column else "prompt_column"
            raise ConfigError(
                "data.prompt_column and data.completion_column go together: set "
                f"data.{missing} too, or clear the other",
                key=f"data.{missing}",
            )
        if self.prompt_column and self.messages_column:
            raise ConfigError(
                f"data.prompt_column ({self.prompt_column!r}) and data.messages_column "
                f"({self.messages_column!r}) exclude each other: clear one of them",
                key="data.messages_column",
            )
        self._check_format()
        if self.source == "builtin" and self.path:
            raise ConfigError(
                f"data.path ({self.path!r}) is not read with data.source=builtin: set "
                "data.source=files or data.source=hub",
                key="data.path",
            )
        if self.source == "hub" and not self.path:
            raise ConfigError("data.source=hub needs data.path, a data set id", key="data.path")
        by_value = self.partitioner in ("natural", "dirichlet")
        if by_value and not self.partition_by and self.source != "builtin":
            raise ConfigError(
                f"data.partitioner={self.partitioner} needs data.partition_by, the column whose "
                "values it goes by; or set data.partitioner=iid",
                key="data.partition_by",
            )

    def _check_format(self) -> None:
        """Refuse columns that the format does not read."""
        for name, takes in (("prompt", _TAKES_PROMPTS), ("messages", _TAKES_MESSAGES)):
            column = getattr(self, f"{name}_column")
            if column and self.format not in takes:
                raise ConfigError(
                    f"data.{name}_column ({column!r}) is not read with data.format={self.format}: "
                    f"set data.format to {' or '.join(takes)}, or clear the column",
                    key="data.format",
                )
