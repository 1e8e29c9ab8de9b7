"""Golden files for tests/test_merge_recipe.c: recipes as people write them, merged by mergekit itself.

    pip install torch==2.5.1 transformers==4.46.3 peft==0.13.2 safetensors mergekit==0.1.4
    python tests/golden/recipe.py          reads tests/golden/merge/, writes tests/golden/recipe/
"""
import os
import shutil
import sys
import tempfile

import yaml
from safetensors.torch import load_file, save_file

from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
OUT = os.path.join(HERE, "recipe")
M = "tests/golden/merge/"  # recipes name paths from the repository's root, where the tests run

RECIPES = {
    "linear": f"""# weights of all kinds: numbers, filters, gradients over depth
merge_method: linear
models:
  - model: {M}model11
    parameters:
      weight:
        - filter: self_attn
          value: [0.1, 0.9]
        - filter: mlp.up_proj
          value: 0.3
        - value: 0.7
  - model: {M}model12
    parameters: {{weight: 0.4}}
dtype: float32
""",
    "unnormalized": f"""models:
  - model: {M}model11
  - model: {M}model12
    parameters:
      weight: 0.25
merge_method: linear
parameters:
  weight: 0.5
  normalize: false
dtype: float32
out_dtype: bfloat16
""",
    "lora": f"""models:
  - model: {M}base+{M}a
    parameters: {{weight: 0.6}}
  - model: {M}base+{M}c
    parameters: {{weight: 0.4}}
merge_method: linear
dtype: float32
""",
    "task": f"""base_model: {M}model11
models:
  - model: {M}model11
  - model: {M}model12
    parameters: {{weight: 0.8}}
  - model: {M}base
    parameters: {{weight: [0.1, 0.3]}}
merge_method: task_arithmetic
parameters:
  lambda: 0.5
  int8_mask: true
dtype: float32
""",
    "ties": f"""merge_method: ties
base_model: {M}base
models:
  - model: {M}model11
    parameters:
      density: [1, 0.4]
      weight: 0.5
  - model: {M}model12
    parameters:
      density: &d 0.6
      weight:
        - filter: down_proj
          value: 0.9
        - value: *d
parameters:
  normalize: true
  int8_mask: true
dtype: float32
""",
    "slerp": f"""slices:
  - sources:
      - model: {M}model11
        layer_range: [0, 2]
      - model: {M}model12
        layer_range: [0, 2]
merge_method: slerp
base_model: {M}model11
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: float32
""",
    "passthrough": f"""slices:
  - sources:
      - {{model: {M}model11, layer_range: [0, 2]}}
  - sources:
      - model: {M}model12
        layer_range: [0, 1]
        parameters:
          scale:
            - filter: o_proj
              value: 0.0
            - filter: down_proj
              value: 0.5
            - value: 1.0
  - sources:
      - {{model: {M}model12, layer_range: [1, 2]}}
merge_method: passthrough
dtype: float32
""",
    "slices": f"""slices:
  - sources:
      - model: {M}base
        layer_range: [0, 1]
      - model: {M}model11
        layer_range: [1, 2]
        parameters: {{weight: 0.3, density: 0.5}}
      - model: {M}model12
        layer_range: [0, 1]
        parameters: {{weight: 0.5}}
    parameters: {{density: 0.8}}
  - sources:
      - model: {M}base
        layer_range: [1, 2]
      - model: {M}model12
        layer_range: [0, 1]
merge_method: breadcrumbs_ties
base_model: {M}base
parameters:
  weight: 1.0
  density: 0.9
  gamma: 0.05
dtype: float32
""",
    "nuslerp": f"""modules:
  default:
    models:
      - model: {M}model11
        parameters: {{weight: 0.7}}
      - model: {M}model12
        parameters: {{weight: 0.3}}
    parameters:
      nuslerp_flatten: false
merge_method: nuslerp
dtype: float32
""",
    "stock": f"""models:
  - model: {M}model11
  - model: {M}model12
merge_method: model_stock
base_model: {M}base
parameters: {{filter_wise: false}}
dtype: float32
""",
}


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    os.makedirs(OUT)
    os.chdir(ROOT)
    for name, text in RECIPES.items():
        with open(os.path.join(OUT, name + ".yaml"), "w") as f:
            f.write(text)
        with tempfile.TemporaryDirectory() as directory:
            config = MergeConfiguration.model_validate(yaml.safe_load(text))
            run_merge(config, directory, options=MergeOptions(
                copy_tokenizer=False, lora_merge_cache=os.path.join(directory, "loras")))
            tensors = load_file(os.path.join(directory, "model.safetensors"))
            save_file({k: v.contiguous() for k, v in tensors.items()},
                      os.path.join(OUT, name + ".safetensors"))
            print(name, len(tensors))


if __name__ == "__main__":
    sys.exit(main())
