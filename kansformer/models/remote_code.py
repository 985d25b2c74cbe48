"""A saved model carries its own code: `trust_remote_code=True` loads it where kansformer is not installed.

transformers loads code from one flat folder, of which it follows only `from .module import name`. So the few modules
that a model needs are written beside its weights, their imports made relative. They run the torch backend; where
kansformer and triton are installed too, the kernels are taken from there.
"""

import os
import re
from pathlib import Path

# What the modeling file needs, in the package.
MODULES = (
    "splines.py",
    "functional.py",
    "layers.py",
    "kernels/torch_kan.py",
    "models/configuration_kansformer.py",
    "models/modeling_kansformer.py",
    "models/remote_code.py",
)

AUTO_MAP = {
    "AutoConfig": "configuration_kansformer.KansformerConfig",
    "AutoModel": "modeling_kansformer.KansformerModel",
    "AutoModelForCausalLM": "modeling_kansformer.KansformerForCausalLM",
    "AutoModelForSequenceClassification": "modeling_kansformer.KansformerForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_kansformer.KansformerForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_kansformer.KansformerForQuestionAnswering",
}


def write_remote_code(folder: str | os.PathLike) -> list[Path]:
    """Write the modules that a model in `folder` needs to load by its `auto_map`; the paths."""
    here, written = Path(__file__).parent, []
    os.makedirs(folder, exist_ok=True)
    places = [here.parent / name for name in MODULES]
    if not all(place.is_file() for place in places):  # this file is such a copy, and transformers cached what it needs
        places = [here / place.name for place in places if (here / place.name).is_file()]
    for source in places:
        target = Path(folder) / source.name
        part = target.with_suffix(f".{os.getpid()}")
        part.write_text(flattened(source.read_text(encoding="utf-8")), encoding="utf-8")
        os.replace(part, target)
        written.append(target)
    return written


def flattened(source: str) -> str:
    """A module of the package as a module of a flat folder, its operators under a name of their own."""
    source = re.sub(r"^from kansformer(\.kernels)? import", "from . import", source, flags=re.MULTILINE)
    source = re.sub(r"^from kansformer(?:\.\w+)*\.(\w+) import", r"from .\1 import", source, flags=re.MULTILINE)
    return source.replace('"kansformer::', '"kansformer_remote::').replace("ops.kansformer.", "ops.kansformer_remote.")
