"""The card of a pair dataset: the README.md that describes its content and how it was made.

Knows text and what the hub reads of it; nothing of how the other files are written or checked.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from datasets import Features
from huggingface_hub import DatasetCardData

from data.pairs import COLUMNS, SPLITS, Failure, dimensions

SUMS, CARD, FAILURES, REPORT = "SHA256SUMS", "README.md", "failures.jsonl", "report.json"

MEANS = (
    "transfer",
    "consistency",
    "held_out_before",
    "held_out_transfer",
    "held_out_consistency",
    "steps",
    "seconds",
)  # shown in the card


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """Facts of the card that are the same for all pairs."""

    name: str
    generator: str
    """Fingerprint of its weights."""
    resolution: int
    num_ws: int
    w_dim: int
    embedder: str
    embedder_fingerprint: str
    preprocess: str
    """How generated images reached the embedder."""
    recipe: str
    settings: dict[str, Any]
    """Of the recipe; anything JSON holds."""
    truncation: float
    precision: str
    """Of the optimizer, as accelerate names it: no (float32) or bf16."""
    seed: int
    targets: tuple[str, ...]
    """Specs of the target pictures."""
    sources: str
    """The bank the optimizer edited, in words."""
    held_out: str
    """The sources kept from it, in words."""
    licence: str
    """Name of the licence on the hub: mit, cc-by-nc-4.0, other."""
    licence_text: str
    """What allows or forbids the use: licences of weights and pictures."""
    command: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9.-]+", self.licence):
            raise ValueError(
                "expected a licence by its name on the hub, e.g. mit, cc-by-nc-4.0 or other, "
                f"found {self.licence!r}; put more into licence_text"
            )


@dataclass
class Survey:
    """Counts, sums and failures of all chunks together."""

    rows: Counter[str] = field(default_factory=Counter)
    """Of each split."""
    totals: dict[str, dict[str, float]] = field(default_factory=dict)
    """Sums of the columns of MEANS over each split."""
    failures: list[Failure] = field(default_factory=list)


def columns_table(columns: Features) -> str:
    """Return the card's table of columns."""
    embed, num_ws, w_dim = dimensions(columns)
    shapes = {
        "embedding": f"[{embed}]",
        "direction": f"[{num_ws}, {w_dim}]",
        "coefficients": "[sources]",
    }
    lines = [
        f"| `{name}` | {dtype} {shapes.get(name, '')} | {meaning} |".replace("  ", " ")
        for name, (dtype, meaning) in COLUMNS.items()
    ]
    return "\n".join(["| column | type | what it is |", "|---|---|---|", *lines])


def counts_table(survey: Survey) -> str:
    """Return the card's table of splits: rows and mean scores."""
    lines = [f"| split | pairs | {' | '.join(MEANS)} |", "|---" * (len(MEANS) + 2) + "|"]
    for split in SPLITS:
        rows, totals = survey.rows[split], survey.totals[split]
        means = [f"{totals[name] / rows:.4g}" if rows else "" for name in MEANS]
        lines.append(f"| {split} | {rows or 'none, so no file'} | {' | '.join(means)} |")
    return "\n".join(lines)


def card_header(info: DatasetInfo, columns: Features, survey: Survey) -> str:
    """Return the card's YAML: licence, files of each split, columns as datasets reads them."""
    filled = [split for split in SPLITS if survey.rows[split]]
    files = [{"split": split, "path": f"data/{split}-*"} for split in filled]
    embed, num_ws, w_dim = dimensions(columns)
    numbers = embed + num_ws * w_dim
    data = DatasetCardData(
        license=info.licence,
        pretty_name=info.name,
        configs=[{"config_name": "default", "data_files": files}] if files else None,
        # From the number of rows `datasets` notices a missing shard. It also requires bytes: those
        # of embeddings and directions, which are nearly all.
        dataset_info={
            "features": columns._to_yaml_list(),
            "splits": [
                {
                    "name": split,
                    "num_bytes": survey.rows[split] * numbers * 4,
                    "num_examples": survey.rows[split],
                }
                for split in filled
            ],
        },
    )
    return f"---\n{data.to_yaml()}\n---\n"


def card(info: DatasetInfo, columns: Features, survey: Survey) -> str:
    """Return README.md: what a row is, how it was made, how to load it, what the licence allows."""
    stages = Counter(failure.stage for failure in survey.failures)
    failed = ", ".join(f"{count} at {stage}" for stage, count in sorted(stages.items())) or "none"
    settings = json.dumps(info.settings, indent=2, sort_keys=True)
    return f"""{card_header(info, columns, survey)}
# {info.name}

Each row is one target picture: its embedding, and the direction in a StyleGAN2's W+ that gives any
source face this picture's essence. The pictures themselves are not in here.

{columns_table(columns)}

## Load

```python
from datasets import load_dataset
pairs = load_dataset("FOLDER_OR_NAME", split="train").with_format("torch")
embedding, direction = pairs[0]["embedding"], pairs[0]["direction"]
```

## How many, how good

{counts_table(survey)}

A target's id alone decides its split, so it stays in it whatever is added. Own scores are means
over the sources the optimizer edited, held-out scores over sources it never did. Targets that gave
no pair: {failed}; each is a line of `{FAILURES}` with its reason.

## How it was made

```
{info.command}
```

| | |
|---|---|
| targets | {", ".join(f"`{spec}`" for spec in info.targets)} |
| generator | {info.resolution} px, W+ [{info.num_ws}, {info.w_dim}], weights `{info.generator}` |
| embedder | {info.embedder}, weights `{info.embedder_fingerprint}` |
| preprocess of generated images | {info.preprocess} |
| sources | {info.sources} |
| held-out sources | {info.held_out} |
| truncation | {info.truncation} |
| mixed precision | {info.precision} |
| seed | {info.seed} |
| recipe | {info.recipe} |

A direction is only valid for this generator, an embedding only for this embedder. The recipe:

```json
{settings}
```

`sha256sum -c {SUMS}` checks the files.

## Licence

{info.licence_text}
"""
