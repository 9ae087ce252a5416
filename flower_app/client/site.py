"""What one message and one node's own configuration say, and what is built from both."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import lru_cache

from flwr.app import Context, Message
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from conf.load import from_json, to_json
from flower_app.build import build_client, describe, set_threads, take_residuals
from flower_app.client.node import client_name, own_config, private_key, public_key
from flower_app.client.place import Place
from flower_app.client.received import read_message
from flower_app.data.client import ClientData, load_client_data
from flower_app.data.text import load_tokenizer
from models import Part, fold_residuals, load_client_state
from strategies.records import KEY_LOST, read_arrays
from strategies.transport.stream.link import GrpcLink

Connect = Callable[..., GrpcLink]


class Site:
    """What one message and this node's own configuration say.

    `connect` opens a session in place of `GrpcLink`.
    """

    def __init__(self, message: Message, context: Context, connect: Connect | None = None) -> None:
        self._connect = connect or GrpcLink
        self._node, self._state = context.node_config, context.state
        self.asked = asked = read_message(message.content)
        self.config = config = own_config(asked.config, self._node)
        self.place = Place(
            seed=config.seed,
            client=client_name(context),
            round=asked.round,
            rounds=asked.rounds,
        )
        self.session = asked.session if config.link.transport == "messages" else ""
        """Under link.transport=messages, what this node's state belongs to; else empty."""
        set_threads(config.runtime.client_threads)

    def data(self) -> tuple[ClientData, PreTrainedTokenizerBase]:
        """This node's examples: its own `data-path`, or its partition of the configured data."""
        path = str(self._node.get("data-path", ""))
        if not path and "partition-id" not in self._node:
            raise ValueError(
                "this node has neither data-path nor partition-id; start its SuperNode with "
                "--node-config 'data-path=\"/path/to/data\"'"
            )
        partition = int(self._node.get("partition-id", 0))
        partitions = int(self._node.get("num-partitions", 1))
        # A step takes several messages; within a session the data is what it was.
        load = _data_of_session if self.session else _data_of_session.__wrapped__
        return load(self.session, to_json(self.config), partition, partitions, path)

    def parts(
        self,
        weights: Mapping[str, Tensor] | None = None,
        residuals: Mapping[str, Tensor] | None = None,
    ) -> tuple[Part, Part]:
        """Bottom and top with the federation's current tensors; the initial ones in round 1.

        Given `weights`, all that is trained, and `residuals`, with these.
        """
        if weights is None:
            residuals, weights = take_residuals(self._received())
            bottom, top = build_client(self.config)
        elif residuals:
            bottom, top = build_client(self.config)
        else:  # every trained tensor is replaced below: another message's parts will do
            bottom, top = _parts_to_fill(to_json(self.config), threading.get_ident())
        mine, trunk = describe(bottom), self.asked.model
        if mine != trunk:
            raise ValueError(
                f"this node's model is {mine}; the trunk was cut from {trunk}. Give both the same "
                "model.path, or this node's copy of it as model-path in --node-config"
            )
        if weights:
            load_client_state(bottom, top, weights)
            fold_residuals((bottom, top), residuals or {})
        return bottom, top

    def _received(self) -> dict[str, Tensor]:
        """The tensors that came with this message: fp32 and finite; the parts check the rest."""
        try:
            return read_arrays(self.asked.arrays)
        except ValueError as error:
            raise ValueError(f"what the server sent cannot be trained on: {error}") from error

    @property
    def residuals(self) -> dict[str, Tensor]:
        """Those that came with this message."""
        return take_residuals(self._received())[0]

    def link(self, steps: int) -> GrpcLink:
        """Open the session that the ticket is for."""
        key = private_key(self._state)
        if key is None:
            raise ValueError(
                f"{KEY_LOST}: its SuperNode was started anew; it takes part again when the server "
                "has asked it who it is"
            )
        return self._connect(self.asked.ticket(), key, steps=steps, config=self.config.link)

    def public_key(self) -> bytes:
        """What tickets for this node are made for."""
        return public_key(self._state)


@lru_cache(maxsize=64)
def _data_of_session(
    session: str, config: str, partition: int, partitions: int, path: str
) -> tuple[ClientData, PreTrainedTokenizerBase]:
    run = from_json(config)
    tokenizer = load_tokenizer(run.model)
    data = load_client_data(
        run.data,
        tokenizer,
        partition=partition,
        partitions=partitions,
        data_path=path,
        seed=run.seed,
    )
    return data, tokenizer


@lru_cache(maxsize=2)
def _parts_to_fill(config: str, thread: int) -> tuple[Part, Part]:
    """Parts for one thread's use: the next message's weights go into the same ones."""
    return build_client(from_json(config))
