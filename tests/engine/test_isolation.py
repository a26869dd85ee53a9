"""What may import what, and what a CPU run must not touch. Each in an interpreter of its own."""

import subprocess
import sys

import pytest


def python(code, **environment):
    import os

    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, timeout=120, check=False
    )


def test_importing_the_package_imports_neither_torch_nor_transformers():
    run = python("import sys, airllm_nb; print(sorted({'torch', 'transformers', 'ipywidgets'} & set(sys.modules)))")
    assert run.stdout == "[]\n", run.stderr


def test_the_engine_needs_no_notebook(checkpoint):
    """Loads and computes where IPython and ipywidgets cannot be imported."""
    run = python(f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('IPython', 'ipywidgets', 'ipykernel'):
            raise ImportError(name + ' is blocked')
sys.meta_path.insert(0, Refuse())
import airllm_nb.engine, airllm_nb.engine.model
from airllm_nb import LayeredModel
import torch
with LayeredModel.from_pretrained({str(checkpoint())!r}, device='cpu', dtype='float32') as model:
    print(tuple(model(torch.zeros(1, 3, dtype=torch.long)).logits.shape))
""")
    assert run.stdout == "(1, 3, 259)\n", run.stderr


@pytest.mark.parametrize("keep", ["all", "none"])
def test_the_cpu_run_touches_nothing_of_cuda(checkpoint, keep):
    """Every entry to CUDA raises, as torch.cuda.Stream() does on a machine without it."""
    run = python(f"""
import torch, transformers
touched = []
def refuse(name):
    class Refuse:
        def __new__(cls, *args, **kwargs):
            touched.append(name)
            raise AssertionError('CUDA touched: ' + name)
    return Refuse
for name in ('Stream', 'Event', 'stream', 'current_stream', 'synchronize', 'empty_cache', 'mem_get_info', 'init', 'set_device',
             '_lazy_init'):
    setattr(torch.cuda, name, refuse(name))
torch.Tensor.pin_memory = torch.Tensor.cuda = refuse('pin_memory')
plain_empty = torch.empty
torch.empty = lambda *args, **kwargs: refuse('pinned')() if kwargs.get('pin_memory') else plain_empty(*args, **kwargs)
from airllm_nb import LayeredModel, plan
folder = {str(checkpoint())!r}
memory = getattr(plan(folder, device='cpu', dtype='float32'), {"total_nbytes" if keep == "all" else "least"!r})
with LayeredModel.from_pretrained(folder, device='cpu', dtype='float32', memory=memory) as model:
    ids = torch.zeros(1, 3, dtype=torch.long)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, pad_token_id=257)
print(touched)
""")
    assert run.stdout == "[]\n", run.stderr[-2000:]
