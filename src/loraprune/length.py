"""Length: how many steps a run takes where epochs are given, and how they fall to warm-up, pruning and recovery.

Reads    Settings, the number of rows that are trained on
Gives    resolved, refuse_idle
Source   LoRAPrune's scripts, for the shares of all steps
Symbols  -
"""

from dataclasses import replace
from math import ceil

from loraprune.errors import UserError
from loraprune.setting import flag
from loraprune.settings import Settings

IN_STEPS = ("warmup_steps", "prune_rounds", "finish_steps")
IN_SHARES = ("warmup_share", "finish_share")


def resolved(settings: Settings, rows: int) -> Settings:
    """Return the settings with warmup_steps, prune_rounds and finish_steps as epochs over `rows` rows make them.

    The steps are epochs x rows / batch, rounded up; what no whole distance between pruning steps fills is recovery.
    Without epochs the settings come back as they are. Raises UserError where no pruning step fits in.
    """
    if settings.epochs is None:
        return settings
    steps = ceil(settings.epochs * rows / min(settings.retain_batch_size, rows) - 1e-9)
    warmup, finish = round(settings.warmup_share * steps), round(settings.finish_share * steps)
    rounds = (steps - warmup - finish) // settings.prune_every
    if rounds < 1:
        raise UserError(
            f"{settings.epochs:g} epochs of {rows} rows are {steps} steps, {warmup} of warm-up and {finish} of "
            f"recovery; a pruning step comes every {settings.prune_every}.",
            "no pruning step fits in between, so nothing would be cut.",
            "raise --epochs, or lower --prune-every, --retain-batch-size, --warmup-share or --finish-share.",
        )
    left = steps - warmup - rounds * settings.prune_every
    return replace(settings, warmup_steps=warmup, prune_rounds=rounds, finish_steps=left)


def refuse_idle(settings: Settings) -> None:
    """Raise UserError for a setting that another one makes void."""
    if settings.floor_rows and settings.final_rows and settings.withheld_rows is not None:
        raise _idle(
            "withheld_rows", "floor_rows and final_rows name the withheld rows", "--floor-rows and --final-rows"
        )
    changed = settings.changed(Settings())
    for name in IN_STEPS if settings.epochs is not None else IN_SHARES:
        if name in changed and settings.epochs is not None:
            raise _idle(name, "epochs and the shares decide the length", "--epochs")
        if name in changed:
            raise needs_epochs(flag(name), "--epochs")


def needs_epochs(written: str, epochs: str) -> UserError:
    """Return the error for a share of all steps that is given without epochs."""
    return UserError(
        f"{written} is given without {epochs}.",
        "it is a share of all steps, which are counted by epochs; without these it would be ignored.",
        f"add {epochs}, or leave {written} out.",
    )


def _idle(name: str, why: str, other: str) -> UserError:
    fix = f"leave out {flag(name)}, or {other}."
    return UserError(f"{flag(name)} is given with {other}.", f"{why}; it would be ignored.", fix)
