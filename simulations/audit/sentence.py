"""What the server reads of one text: the shortest way to see what h1 gives away."""

from __future__ import annotations

import copy
import secrets
from typing import Any

import torch
from torch import Tensor

from conf.schema import Config
from flower_app.client import streamed
from flower_app.client.defences.defence import defend
from flower_app.client.defences.registry import make_defence
from flower_app.client.perturbed import perturb
from flower_app.client.site_key import SiteKey
from flower_app.data.client import Batch, load_tokenizer
from models import Parts
from simulations.audit.adaptive import as_sent
from simulations.audit.attacks.search import search
from simulations.audit.observation import EXACT, Crossed, Knowledge
from simulations.audit.recording import EXACT_CODECS
from simulations.audit.subject import subject_of
from simulations.audit.tap import TappedLink
from simulations.audit.texts import public_ids
from strategies.engine.engine import TrunkEngine

SENTENCE = (
    "Dear Dr. Margaret Whitfield, please call me back on 0171 555 0934 after four o'clock; "
    "the results of my biopsy came in on Tuesday."
)
"""Has a name, a number, and what nobody else should read."""


def read_sentence(config: Config, text: str = SENTENCE, *, trained: str = "") -> dict[str, Any]:
    """Send a text's h1 to a trunk as evaluation does, and search for the text.

    Parameters
    ----------
    config : Config
        Model, cut, codec, defences.
    text : str
        What the client evaluates.
    trained : str
        Folder of the model that a run has left; empty: as the configuration begins.

    Returns
    -------
    dict
        ``tokens``, how many were ``found``, the ``text`` and what was ``read``.

    Raises
    ------
    ValueError
        If the text is too short to be evaluated.
    """
    config = (subject := subject_of(config, trained)).config
    parts, tokenizer = subject.parts(), load_tokenizer(config.model)
    ids_BT = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    if ids_BT.shape[1] < 2:
        raise ValueError(f"--text={text!r} is one token; give a text of two or more")
    crossed = _evaluated(parts, config, ids_BT)
    assert crossed.h1_BTD is not None
    vocabulary = parts.bottom.config.get_text_config(decoder=True).vocab_size
    public = public_ids(tokenizer, 64, 8, vocabulary)
    sent, noise = as_sent(config.privacy, parts.bottom, [crossed], public)
    knowledge = Knowledge(
        level=EXACT,
        ends=lambda crossed: (parts.bottom, parts.top),
        loss=lambda ends, trunk, examples: torch.zeros(len(examples)),
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        sent=sent,
        noise=noise,
        rough=bool(noise) or config.link.codec["h1"] not in EXACT_CODECS,
        device=parts.bottom.device,
        trunk=parts.trunk.eval(),
        public=public,
    )
    with knowledge.device:
        found_BT = search(parts.bottom, crossed.h1_BTD, knowledge).cpu()
    return {
        "cut": config.cut.bottom,
        "codec": config.link.codec["h1"],
        "defence": config.privacy.defence,
        "noise": config.privacy.noise,
        "tokens": ids_BT.shape[1],
        "found": int((found_BT == ids_BT).sum()),
        "text": text,
        "read": tokenizer.decode(found_BT[0]),
    }


def _evaluated(parts: Parts, config: Config, ids_BT: Tensor) -> Crossed:
    """What crosses where a client evaluates a text, as the run's defences and codecs leave it."""
    engine = TrunkEngine(
        parts.trunk, hidden_size=parts.trunk.hidden_size, train=config.train, max_in_flight=2**62
    )
    engine.open_round(1, 1, training=False)
    link = TappedLink(config.link, engine.open("audit", client="client-0"))
    bottom, top = copy.deepcopy((parts.bottom, parts.top))
    perturb(bottom, top, SiteKey(secrets.token_bytes(32)), config.privacy.perturb)
    defend(bottom, top, make_defence(config.privacy, secrets.token_bytes(32)))
    held_out = [Batch(ids_BT, torch.ones_like(ids_BT), ids_BT)]
    streamed.evaluate(bottom, top, link, held_out, config.train)
    return link.crossed[0, 0].to(bottom.device)
