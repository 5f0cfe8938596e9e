"""The README.md of a network that leaves the project: what it is, how to sample it, how it was made."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from ddim_jax.checkpoints.diffusers_scheduler import TAUS
from ddim_jax.utils import files

MARK = "tags: [ddim, ddpm, jax, ddim_jax]"  # on every card

_CARD = """\
---
library_name: diffusers
pipeline_tag: unconditional-image-generation
{mark}
---

# {name}

A U-Net of DDPM with {count:,} parameters for images of {size}x{size}x{channels}, which predicts {prediction}, \
written by ddim_jax{updates}.

## Sample it

With diffusers:

```python
from diffusers import DDIMPipeline

pipeline = DDIMPipeline.from_pretrained("THIS_FOLDER")
image = pipeline(batch_size=1, num_inference_steps=50, eta=0.0{clipped}).images[0]
```

{notes}With ddim_jax, any process of the DDIM family over any tau:

```bash
python -m ddim_jax.sample --config configs/default.py --config.pretrained=THIS_FOLDER --config.sample.steps=50
```

## How it was made

```json
{config}
```
"""


def is_ours(file: pathlib.Path) -> bool:
    """Whether a file begins as a model card of `markdown`."""
    if not file.is_file():
        return False
    with open(file, "rb") as card:
        return MARK.encode() in card.read(1000)


def markdown(config: Mapping[str, Any], step: int | None, count: int) -> str:
    """Markdown with the front matter of the Hugging Face hub. config: a name that `files.check_name` accepts; model,
    schedule and sample, of the right types; and all else that may be known of it, as `config.public` gives it. step:
    the number of updates, where it is known. count: of parameters.
    """
    model, sample = config["model"], config["sample"]
    notes = []
    if sample["tau"] not in TAUS:
        tau = files.printable(sample["tau"][:100]).replace("`", "'")
        notes.append(f"Its tau was `{tau}`, which diffusers does not have; its own spacing stands in for it.")
    if sample["clip_x0"]:
        notes.append("The predicted x_0 is clipped, and eps derived again from it, which that argument asks for.")
    if model["num_classes"]:
        notes.append("The network is class-conditional: the pipeline cannot pass classes, its unet takes class_labels.")
    if model["label_dropout"]:
        notes.append(f"Class {model['num_classes']} says nothing of the image: it is for classifier-free guidance.")
    return _CARD.format(
        mark=MARK,
        name=config["name"],
        count=count,
        size=model["image_size"],
        channels=model["image_channels"],
        prediction={"eps": "the noise", "x0": "the image", "v": "v"}[model["prediction"]],
        updates=f" after {step:,} updates" if step else "",
        clipped=", use_clipped_model_output=True" if sample["clip_x0"] else "",
        notes="".join(f"{note}\n" for note in notes) + ("\n" if notes else ""),
        config=json.dumps(config, indent=1),
    )
