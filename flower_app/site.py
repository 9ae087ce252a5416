"""What one message and one node's own configuration say, and what is built from both."""

from __future__ import annotations

import dataclasses

from flwr.app import Context, Message
from transformers import PreTrainedTokenizerBase

from conf.load import from_json
from conf.schema import Config
from flower_app import training
from flower_app.assembly import build_client, describe, set_threads
from flower_app.data import ClientData, load_client_data
from flower_app.text import load_tokenizer
from models import Part, load_client_state
from strategies.answers import ARRAYS, CONFIG, TICKET, from_arrays
from strategies.transport.link import GrpcLink


class Site:
    """What one message and this node's own configuration say."""

    def __init__(self, message: Message, context: Context) -> None:
        content, self._node = message.content, context.node_config
        self._ticket = content.config_records[TICKET]
        self._arrays = content.array_records[ARRAYS]
        config = from_json(str(content.config_records[CONFIG]["json"]))
        if own := str(self._node.get("model-path", "")):
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=own))
        self.config: Config = config
        self.place = training.Place(
            seed=config.seed,
            client=client_name(context),
            round=int(self._ticket["round"]),  # type: ignore[arg-type]
            rounds=int(self._ticket["rounds"]),  # type: ignore[arg-type]
        )
        set_threads(config.runtime.client_threads)

    def data(self) -> tuple[ClientData, PreTrainedTokenizerBase]:
        """This node's examples: its own `data-path`, or its partition of the configured data."""
        path = str(self._node.get("data-path", ""))
        if not path and "partition-id" not in self._node:
            raise ValueError(
                "this node has neither data-path nor partition-id; start its SuperNode with "
                "--node-config 'data-path=\"/path/to/data\"'"
            )
        tokenizer = load_tokenizer(self.config.model)
        data = load_client_data(
            self.config.data,
            tokenizer,
            partition=int(self._node.get("partition-id", 0)),
            partitions=int(self._node.get("num-partitions", 1)),
            data_path=path,
            seed=self.config.seed,
        )
        return data, tokenizer

    def parts(self) -> tuple[Part, Part]:
        """Bottom and top with the federation's current tensors; the initial ones in round 1."""
        bottom, top = build_client(self.config)
        mine, trunk = describe(bottom), str(self._ticket["model"])
        if mine != trunk:
            raise ValueError(
                f"this node's model is {mine}; the trunk was cut from {trunk}. Give both the same "
                "model.path, or this node's copy of it as model-path in --node-config"
            )
        if self._arrays:
            load_client_state(bottom, top, from_arrays(self._arrays))
        return bottom, top

    def link(self, steps: int) -> GrpcLink:
        """Open the session that the ticket is for."""
        certificate = self._ticket["certificate"]
        assert isinstance(certificate, bytes)
        return GrpcLink(
            str(self._ticket["address"]),
            str(self._ticket["token"]),
            client=self.place.client,
            steps=steps,
            config=self.config.link,
            certificate=certificate,
        )


def client_name(context: Context) -> str:
    """A name that stays the same from run to run: the node's `name`, its partition, or its id."""
    node = context.node_config
    if "name" in node:
        return str(node["name"])
    if "partition-id" in node:
        return f"client-{node['partition-id']}"
    return f"node-{context.node_id}"
