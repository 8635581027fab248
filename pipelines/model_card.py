"""The README of a saved pipeline."""

from __future__ import annotations

from prior import Prior
from tokenizer import ImageTokenizer

_CARD = """---
library_name: tessera
pipeline_tag: {tag}
tags: [image-generation, vq-vae, two-stage]
---

# {height}x{width} images in two stages

A {tokenizer} tokenizer turns {channels}-channel images of {height}x{width} pixels into codes
({layout}, {bits:,.0f} bits an image); a {prior} prior with {parameters:,} parameters models the codes{conditional}.

```python
from pipelines import ImageGenerationPipeline

pipeline = ImageGenerationPipeline.from_pretrained("THIS_FOLDER_OR_HUB_NAME")
pipeline(num_images=4{example}, seed=0).images[0].save("sample.png")
```

| | |
|---|---|
| quantizer | {quantizer} |
| tokenizer parameters | {tokenizer_parameters:,} |
| fingerprint | `{fingerprint}` |
{classes}
"""


def model_card(tokenizer: ImageTokenizer, prior: Prior) -> str:
    """Markdown that says what a pipeline is made of and how to load it."""
    channels, height, width = tokenizer.image_shape
    names = prior.config.class_names or []
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    quantizer = tokenizer.config.quantizer or {}
    return _CARD.format(
        tag="unconditional-image-generation",
        height=height,
        width=width,
        channels=channels,
        tokenizer=tokenizer.config.model_type.removeprefix("tessera-"),
        prior=prior.config.model_type.removeprefix("tessera-"),
        layout=tokenizer.code_layout,
        bits=tokenizer.code_layout.bits,
        parameters=sum(p.numel() for p in prior.parameters()),
        tokenizer_parameters=sum(p.numel() for p in tokenizer.parameters()),
        conditional=f", given one of {len(names)} classes" if names else "",
        example=f', labels="{names[0]}"' if names else "",
        quantizer=", ".join(f"{key}: {value}" for key, value in quantizer.items()),
        fingerprint=tokenizer.fingerprint,
        classes=f"| classes | {shown} |" if names else "",
    )
