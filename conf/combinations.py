"""What may not be set together across sections, refused with the remedy."""

from __future__ import annotations

from conf.rules import ConfigError
from conf.sections.aggregation import AggregationConfig
from conf.sections.cut import CutConfig
from conf.sections.data import DataConfig
from conf.sections.federation import FederationConfig
from conf.sections.link import LinkConfig
from conf.sections.model import ModelConfig
from conf.sections.output import OutputConfig
from conf.sections.privacy import PrivacyConfig
from conf.sections.train import TrainConfig
from conf.sections.tuning import TuningConfig


def check_model(model: ModelConfig, data: DataConfig) -> None:
    """Refuse a run without a model, and one whose model cannot hold the context."""
    if not model.path and not model.scratch:
        raise ConfigError(
            "no model: set model.path to a folder, hub id or last:NAME, or describe one in "
            "model.scratch",
            key="model.path",
        )
    for name in ("max_position_embeddings", "n_positions"):
        limit = model.scratch.get(name)
        if isinstance(limit, int) and limit < data.context:
            raise ConfigError(
                f"data.context ({data.context}) is longer than model.scratch.{name} "
                f"({limit}): lower one or raise the other",
                key="data.context",
            )


def check_trained(model: ModelConfig, cut: CutConfig, tuning: TuningConfig) -> None:
    """Refuse a run that would train nothing, or what its type cannot hold."""
    modes = {role: getattr(tuning, role) for role in ("bottom", "trunk", "top")}
    # LoRA adapts the linear layers of blocks; the trunk always has some.
    empty = [
        role
        for role, blocks in (("bottom", cut.bottom), ("top", cut.top))
        if modes[role] == "lora" and blocks == 0
    ]
    if empty and all(mode == "frozen" for role, mode in modes.items() if role not in empty):
        raise ConfigError(
            "nothing would be trained: "
            + " and ".join(f"tuning.{role}=lora with cut.{role}=0" for role in empty)
            + " has no blocks to adapt, and the rest is frozen; give it blocks "
            + f"(cut.{empty[0]}=1), or make another part lora or full",
            key=f"cut.{empty[0]}",
        )
    full = [role for role, mode in modes.items() if mode == "full"]
    if model.dtype == "fp16" and full:
        raise ConfigError(
            f"model.dtype=fp16 cannot be trained as a whole ({_assigned('tuning', full, 'full')}): "
            "small updates, and adamw's eps, are zero in fp16; set model.dtype=bf16 or "
            "model.dtype=fp32, or tune with lora, whose adapters are fp32",
            key="model.dtype",
        )


def check_aggregated(
    how: AggregationConfig, model: ModelConfig, train: TrainConfig, tuning: TuningConfig
) -> None:
    """Refuse a way to average that these adapters, types or steps do not allow."""
    lora = "lora" in vars(tuning).values()
    if how.lora != "factors" and not lora:
        raise ConfigError(
            f"aggregation.lora={how.lora} is about adapters, and no part has any: set "
            "tuning.bottom, tuning.trunk or tuning.top to lora, or clear aggregation.lora",
            key="aggregation.lora",
        )
    if how.lora == "exact" and model.dtype != "fp32":
        raise ConfigError(
            f"aggregation.lora=exact with model.dtype={model.dtype}: what the adapters' "
            "rank cannot hold goes into the base weights, and most of it would be rounded away; "
            "set model.dtype=fp32, or aggregation.lora=svd",
            key="aggregation.lora",
        )
    if train.sync == "step" and (how.optimizer != "fedavg" or how.lora in ("exact", "svd")):
        raise ConfigError(
            f"train.sync=step keeps clients' ends equal, so that nothing is left to aggregate: "
            f"aggregation.optimizer={how.optimizer} and aggregation.lora={how.lora} must be "
            "fedavg, and factors or ffa; or set train.sync=round",
            key="train.sync",
        )
    if how.robust != "none" and train.sync == "step":
        raise ConfigError(
            f"train.sync=step takes each step of clients' ends on the server, and leaves nothing "
            f"to aggregation.robust={how.robust}: set train.outlier_clip, which bounds every "
            "client's share of a step, and aggregation.robust=none; or set train.sync=round",
            key="aggregation.robust",
        )
    if how.robust != "none" and how.ends == "local" and train.strategy in ("splitfed-v2", "merged"):
        raise ConfigError(
            f"aggregation.robust={how.robust} with aggregation.ends=local and train.strategy="
            f"{train.strategy} has nothing to aggregate: ends stay with their clients, and there "
            "is one trunk; set train.strategy=splitfed-v1, or aggregation.robust=none",
            key="aggregation.robust",
        )


def check_ends(
    how: AggregationConfig, train: TrainConfig, data: DataConfig, output: OutputConfig
) -> None:
    """Refuse what needs to know ends that never leave their client."""
    if how.ends == "average":
        if output.share_trunk:
            raise ConfigError(
                "output.share_trunk=true is for aggregation.ends=local or local-top, where each "
                "site exports a model of its own; with aggregation.ends=average the server "
                "exports the one model: set output.share_trunk=false",
                key="output.share_trunk",
            )
        return
    stay = f"aggregation.ends={how.ends}: what stays with its client"
    if train.sync == "step":
        raise ConfigError(
            f"{stay} cannot take a common step (train.sync=step): set train.sync=round, or "
            "aggregation.ends=average",
            key="aggregation.ends",
        )
    if how.optimizer != "fedavg":
        raise ConfigError(
            f"{stay} cannot be moved by a server optimizer, which begins with the clients' first "
            f"tensors (aggregation.optimizer={how.optimizer}): set aggregation.optimizer=fedavg, "
            "or aggregation.ends=average",
            key="aggregation.optimizer",
        )
    if data.central_path:
        raise ConfigError(
            f"{stay} cannot be evaluated by the server (data.central_path={data.central_path!r}): "
            "clear it, for each client evaluates its own model, or set aggregation.ends=average",
            key="data.central_path",
        )
    if output.checkpoint_every > 1:
        raise ConfigError(
            f"output.checkpoint_every={output.checkpoint_every} with aggregation.ends={how.ends}: "
            "a resumed run goes back to its last checkpoint, and sites keep their own ends of the "
            "last rounds only; set output.checkpoint_every=1, or 0 for a run that need not go on",
            key="output.checkpoint_every",
        )


def check_masked(
    privacy: PrivacyConfig,
    how: AggregationConfig,
    train: TrainConfig,
    data: DataConfig,
) -> None:
    """Refuse what the server can only do with ends that it reads."""
    if privacy.ends == "plain":
        return
    remedies = {
        "train.sync=step": (train.sync == "step", "train.sync=round"),
        f"train.bridge={train.bridge}": (train.bridge > 0, "train.bridge=0"),
        f"aggregation.ends={how.ends}": (how.ends != "average", "aggregation.ends=average"),
        f"aggregation.lora={how.lora}": (
            how.lora not in ("factors", "ffa"),
            "aggregation.lora=factors or ffa",
        ),
        f"aggregation.robust={how.robust}": (how.robust != "none", "aggregation.robust=none"),
        f"aggregation.optimizer={how.optimizer}": (
            how.optimizer != "fedavg",
            "aggregation.optimizer=fedavg",
        ),
        f"data.central_path={data.central_path!r}": (bool(data.central_path), "data.central_path="),
    }
    for said, (wrong, remedy) in remedies.items():
        if wrong:
            raise ConfigError(
                f"{said} with privacy.ends={privacy.ends}: the server only adds clients' ends, "
                f"and cannot read them; set {remedy}, or privacy.ends=plain",
                key=said.partition("=")[0],
            )


def check_noisy_updates(
    privacy: PrivacyConfig, how: AggregationConfig, train: TrainConfig, tuning: TuningConfig
) -> None:
    """Refuse to clip updates of ends where none leave, or something else leaves beside them."""
    if not privacy.update_clip:
        return
    frozen = (tuning.bottom, tuning.top) == ("frozen", "frozen")
    wrong = {
        "train.sync=step": (
            train.sync == "step",
            "gradients of the ends cross at each step: set train.sync=round",
        ),
        f"train.bridge={train.bridge}": (
            train.bridge > 0,
            "the bridge would leave without noise: set train.bridge=0",
        ),
        "aggregation.ends=local": (
            how.ends == "local",
            "ends stay at their clients, and no update leaves: set aggregation.ends=average",
        ),
        "tuning.bottom=frozen": (
            frozen,
            "with tuning.top=frozen no update leaves: set tuning.bottom or tuning.top",
        ),
    }
    for said, (found, why) in wrong.items():
        if found:
            raise ConfigError(
                f"privacy.update_clip={privacy.update_clip:g} with {said}: {why}, or "
                "privacy.update_clip=0 and privacy.update_noise=0",
                key="privacy.update_clip",
            )


def check_nopeek(privacy: PrivacyConfig, cut: CutConfig, tuning: TuningConfig) -> None:
    """Refuse to teach a bottom that does not learn."""
    without = tuning.bottom == "lora" and cut.bottom == 0
    if privacy.defence == "nopeek" and (without or tuning.bottom == "frozen"):
        said = f"tuning.bottom={tuning.bottom}" + (" and cut.bottom=0" if without else "")
        raise ConfigError(
            f"privacy.defence=nopeek teaches the bottom to say less, and with {said} it learns "
            "nothing: set tuning.bottom=full, or privacy.defence=none",
            key="privacy.defence",
        )


def check_bridge(how: AggregationConfig, train: TrainConfig) -> None:
    """Refuse a bridge that nobody would average."""
    if not train.bridge:
        return
    if how.ends != "average":
        raise ConfigError(
            f"train.bridge={train.bridge} is averaged by the server, with aggregation.ends="
            f"{how.ends} ends stay with their clients, and a bridge fits the ends it was trained "
            "with: set train.bridge=0, and make one at each site afterwards with `graft bridge`, "
            "or set aggregation.ends=average",
            key="train.bridge",
        )
    if train.sync == "step":
        raise ConfigError(
            f"train.bridge={train.bridge} is averaged at the end of a round, and with "
            "train.sync=step the server takes each step of the ends, and never sees what a bridge "
            "learns from: set train.bridge=0 or train.sync=round",
            key="train.bridge",
        )


def check_watched(
    train: TrainConfig, output: OutputConfig, data: DataConfig, federation: FederationConfig
) -> None:
    """Refuse to wait for a better loss, or to export the best, where nobody measures any."""
    if data.central_path or (data.heldout and federation.fraction_evaluate):
        return
    wanted = [f"train.patience={train.patience}"] if train.patience else []
    wanted += ["output.model=best"] if output.model == "best" else []
    if wanted:
        raise ConfigError(
            f"{' and '.join(wanted)} by a held-out loss, and nobody evaluates "
            f"(data.heldout={data.heldout:g}, federation.fraction_evaluate="
            f"{federation.fraction_evaluate:g}): hold something out, or give the server a file "
            "of its own (data.central_path)",
            key=wanted[0].partition("=")[0],
        )


def _assigned(section: str, names: list[str], value: str) -> str:
    return ", ".join(f"{section}.{name}={value}" for name in names)


def check_cache(link: LinkConfig, tuning: TuningConfig) -> None:
    """Refuse to keep activations of a bottom that changes them."""
    if link.cache_mb and tuning.bottom != "frozen":
        raise ConfigError(
            f"link.cache_mb={link.cache_mb:g} keeps what the bottom makes of an example, and with "
            f"tuning.bottom={tuning.bottom} it makes something else after each step: set "
            "tuning.bottom=frozen, or link.cache_mb=0",
            key="link.cache_mb",
        )
