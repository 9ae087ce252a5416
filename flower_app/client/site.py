"""What one message and one node's own configuration say, and what is built from both."""

from __future__ import annotations

import hmac
import threading
from collections.abc import Callable, Mapping
from functools import lru_cache

from flwr.app import ConfigRecord, Context, Message, RecordDict
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from conf.load import from_json, to_json
from flower_app.build import (
    build_bridge,
    build_client,
    describe,
    own_names,
    set_threads,
    take_residuals,
)
from flower_app.client.defences.defence import Defence, defend
from flower_app.client.defences.registry import NONE, make_defence
from flower_app.client.masked import hide, reveal
from flower_app.client.node import client_name, own_config, private_key, public_key
from flower_app.client.noisy import noisy_ends
from flower_app.client.own import OwnEnds, site_folder
from flower_app.client.perturbed import perturb
from flower_app.client.place import Place
from flower_app.client.received import read_message
from flower_app.client.remembered import load_cache, save_cache
from flower_app.client.required import refuse_weaker
from flower_app.client.site_key import SiteKey, key_of_node, refuse_plain
from flower_app.data.client import ClientData, load_client_data
from flower_app.data.text import load_tokenizer
from models import Part, client_state, fold_residuals, load_client_state
from models.bridge import Regression, bridge_state, load_bridge_state, take_bridge
from strategies.aggregate.masked import MaskedSum
from strategies.records import ARRAYS, KEY_LOST, MASK, read_arrays, to_arrays
from strategies.transport.stream.link import GrpcLink

Connect = Callable[..., GrpcLink]

KEY_LOST_WORDS = (
    f"{KEY_LOST}: its SuperNode was started anew; it takes part again when the server has asked it "
    "who it is"
)


class Site:
    """What one message and this node's own configuration say.

    `connect` opens a session in place of `GrpcLink`.
    """

    def __init__(self, message: Message, context: Context, connect: Connect | None = None) -> None:
        self._connect = connect or GrpcLink
        self._node, self._state = context.node_config, context.state
        self.own: OwnEnds | None = None
        self.bridge: Regression | None = None
        self.asked = asked = read_message(message.content)
        self.config = config = own_config(asked.config, self._node)
        self.place = Place(
            seed=config.seed,
            client=client_name(context),
            round=asked.round,
            rounds=asked.rounds,
            secret=self._secret(b"graft examples") if config.link.cache_mb else b"",
        )
        self.session = asked.session if config.link.transport == "messages" else ""
        """Under link.transport=messages, what this node's state belongs to; else empty."""
        if config.aggregation.ends != "average" and not asked.run and asked.session:
            raise ValueError(
                "the server names no run, and this site keeps its own ends by that "
                f"(aggregation.ends={config.aggregation.ends}); run the same release of Graft "
                "there and here"
            )
        if config.aggregation.ends != "average" and asked.run:
            folder = site_folder(self._node, asked.run, self.place.client)
            self.own = OwnEnds(self._state, folder, asked.run)
        self.start: dict[str, Tensor] = {}
        """The ends as the round began with them, where their update is clipped; else empty."""
        self._key: SiteKey | None = None
        refuse_weaker(config.privacy, self._node)
        if config.privacy.ends == "masked":
            self._key = key_of_node(self._node)
        else:
            refuse_plain(self._node)
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
        bridge: dict[str, Tensor] = {}
        begins = weights is None
        if weights is None:
            bridge, everything = take_bridge(self._received())
            residuals, received = take_residuals(everything)
            bottom, top = build_client(self.config)
            weights = self._with_own(received, bottom, top)
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
        if begins and self.config.privacy.update_clip:
            self.start = {n: t.clone() for n, t in client_state(bottom, top).items()}
        if own := build_bridge(self.config, bottom):
            if bridge:
                load_bridge_state(own, bridge)
            self.bridge = Regression(own)
        elif bridge:
            raise ValueError("the server sends a bridge, and this run has none (train.bridge=0)")
        if self._key is not None:
            perturb(bottom, top, self._key, self.config.privacy.perturb)
        defend(bottom, top, self._defence())
        return bottom, top

    def _defence(self) -> Defence | None:
        """What is done to all that these parts give out."""
        if self.config.privacy.defence == NONE:
            return None
        return make_defence(self.config.privacy, self._noise_secret())

    def _noise_secret(self) -> bytes:
        """What this round's noise is made of."""
        purpose = f"graft noise {self.asked.round} {self.asked.run}"
        if not (secret := self._secret(purpose.encode())):
            raise ValueError(KEY_LOST_WORDS)
        return secret

    def trained(self, bottom: Part, top: Part, tokens: int) -> RecordDict:
        """What the server gets of the trained ends; what it does not is kept here, by the round.

        Masked, they are weighted by `tokens`.
        """
        if self.own is not None:
            stays = own_names(self.config, bottom, top)
            self.own.keep(
                self.asked.round,
                {name: t for name, t in client_state(bottom, top).items() if name in stays},
                base=self.asked.ends_round,
                best=self.asked.ends_best,
                most=self.config.output.keep_checkpoints,
            )
        if self._key is None:
            return RecordDict({ARRAYS: to_arrays(self._leaving(self.shared(bottom, top)))})
        masked = hide(self._leaving(client_state(bottom, top)), tokens, self._key)
        told = ConfigRecord({"nonce": masked.nonce, "check": masked.check})
        return RecordDict({ARRAYS: to_arrays(masked.tensors), MASK: told})

    def shared(self, bottom: Part, top: Part) -> dict[str, Tensor]:
        """What of the ends, and of the bridge, may leave this client as it is."""
        if self._key is not None:
            raise ValueError(
                f"the server asks for this site's ends, and may not read them (privacy.ends="
                f"{self.config.privacy.ends})"
            )
        stays = own_names(self.config, bottom, top)
        state = {name: t for name, t in client_state(bottom, top).items() if name not in stays}
        return {**state, **(bridge_state(self.bridge.bridge) if self.bridge else {})}

    def _leaving(self, ends: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is sent of trained ends: the one place where their update is clipped and noised."""
        privacy = self.config.privacy
        if not privacy.update_clip:
            return ends
        return noisy_ends(privacy, self.start, ends, self._noise_secret(), f"{self.asked.round}")

    def export(self) -> RecordDict:
        """Save what of this site's model stays here, now that the run is over."""
        if self.own is None:
            raise ValueError(
                "the server asks this site to save ends of its own, and has none "
                f"(aggregation.ends={self.config.aggregation.ends})"
            )
        path = self.own.export(self.config, self.asked.ends_round, self._received())
        print(f"{self.place.client}: its own model is in {path}", flush=True)
        return RecordDict()

    def _with_own(
        self, received: Mapping[str, Tensor], bottom: Part, top: Part
    ) -> Mapping[str, Tensor]:
        """What came with the message, and what of the ends has stayed here."""
        names = own_names(self.config, bottom, top)
        if self.own is None or not names:
            return received
        if odd := sorted(names & received.keys()):
            raise ValueError(
                f"the server sends '{odd[0]}', which stays with its client under "
                f"aggregation.ends={self.config.aggregation.ends}"
            )
        if number := self.asked.ends_round:
            return {**received, **self.own.tensors(number)}
        if not received:
            return received
        start = client_state(bottom, top)
        return {**received, **{name: start[name] for name in names}}

    def _received(self) -> dict[str, Tensor]:
        """The tensors that came with this message: fp32 and finite; the parts check the rest."""
        asked, masked = self.asked, self._key is not None
        try:
            tensors = read_arrays(asked.arrays, masked=masked)
            if self._key is None or not tensors:
                return tensors
            check, weight = asked.masks_check, asked.masks_weight
            return reveal(MaskedSum(tensors, tuple(asked.masks), weight, check), self._key)
        except ValueError as error:
            raise ValueError(f"what the server sent cannot be trained on: {error}") from error

    @property
    def key_check(self) -> bytes:
        """Of this site's key; empty if the run needs none."""
        return self._key.check if self._key is not None else b""

    @property
    def residuals(self) -> dict[str, Tensor]:
        """Those that came with this message; masked ends have none."""
        return {} if self._key is not None else take_residuals(self._received())[0]

    def link(self, steps: int) -> GrpcLink:
        """Open the session that the ticket is for; with a cache, if it trains."""
        limit = self.config.link.cache_mb
        cache = load_cache(self._state, limit) if limit and steps else None
        key = private_key(self._state)
        if key is None:
            raise ValueError(KEY_LOST_WORDS)
        ticket, config = self.asked.ticket(), self.config.link
        return self._connect(ticket, key, steps=steps, config=config, cache=cache)

    def remember(self, link: GrpcLink) -> None:
        """Keep what a session has left in its cache, if it had one."""
        if link.cache is not None:
            save_cache(self._state, link.cache.cache)

    def _secret(self, purpose: bytes) -> bytes:
        """A secret of this node alone; empty if it was not asked for its key yet."""
        key = private_key(self._state)
        return hmac.digest(key, purpose, "sha256") if key else b""

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
