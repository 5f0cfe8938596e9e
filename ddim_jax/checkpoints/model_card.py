"""The model card of an exported network, README.md: what the network is, how to sample it, and its config."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from ddim_jax.checkpoints.diffusers_scheduler import TAUS
from ddim_jax.utils import files

MARK = "tags: [ddim, ddpm, jax, ddim_jax]"  # in every model card

_CARD = """\
---
library_name: diffusers
pipeline_tag: unconditional-image-generation
{mark}
---

# {name}

The U-Net of DDPM with {count:,} parameters, for images of {size}x{size}x{channels}. It predicts {prediction}. \
Exported by ddim_jax{updates}.

## Sampling

With diffusers:

```python
from diffusers import {pipeline}

pipeline = {pipeline}.from_pretrained("THIS_FOLDER")
image = pipeline(batch_size=1, num_inference_steps={arguments}).images[0]
```

{notes}With ddim_jax, by any process of the DDIM family and with any tau:

```bash
python -m ddim_jax.sample --config configs/default.py --config.pretrained=THIS_FOLDER --config.sample.steps=50
```

## Config

```json
{config}
```
"""


def is_from_ddim_jax(file: pathlib.Path) -> bool:
    """Whether `markdown` wrote the model card in a file."""
    if not file.is_file():
        return False
    with open(file, "rb") as card:
        return MARK.encode() in card.read(1000)


def markdown(config: Mapping[str, Any], step: int | None, count: int) -> str:
    """The model card: Markdown with the front matter of the Hugging Face hub.

    config: name, accepted by `files.check_name`; model, schedule and sample, with values of the right types; and all
    other fields that `config.public` returns. step: the number of updates, None if it is not known. count: the number
    of parameters.
    """
    model, sample = config["model"], config["sample"]
    notes = []
    if sample["tau"] not in TAUS:
        tau = files.printable(sample["tau"][:100]).replace("`", "'")
        notes.append(f"The tau `{tau}` does not exist in diffusers. The scheduler has a similar timestep spacing.")
    learned = model.get("learn_sigma", False)
    if learned:
        notes.append("The network also predicts a variance, which `DDIMPipeline` does not support.")
    clipped = ", use_clipped_model_output=True" if sample["clip_x0"] else ""
    if clipped and not learned:
        notes.append("With `use_clipped_model_output=True`, eps is computed from the clipped prediction of x_0.")
    if model["num_classes"]:
        notes.append("The network is class-conditional. Its unet takes `class_labels`; the pipeline does not.")
    if model["label_dropout"]:
        notes.append(f"Class {model['num_classes']} means that no class is given. Classifier-free guidance needs it.")
    return _CARD.format(
        mark=MARK,
        name=config["name"],
        count=count,
        size=model["image_size"],
        channels=model["image_channels"],
        prediction={"eps": "the noise", "x0": "the image", "v": "v"}[model["prediction"]],
        updates=f" after {step:,} updates" if step else "",
        pipeline="DDPMPipeline" if learned else "DDIMPipeline",
        arguments=str(config["schedule"]["num_steps"]) if learned else f"50, eta=0.0{clipped}",
        notes="".join(f"{note}\n" for note in notes) + ("\n" if notes else ""),
        config=json.dumps(config, indent=1),
    )
