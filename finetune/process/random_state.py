"""random、numpy、torch 的随机状态：取出与恢复。"""

import random

import numpy as np
import torch

from finetune.process.accelerator import random_state_of_card, set_random_state_of_card


def random_state() -> dict[str, torch.Tensor]:
    """本进程 torch、加速卡、numpy、random 的随机状态，都写成张量。"""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "numpy.keys": torch.from_numpy(keys.astype(np.int64)),
        "numpy.rest": torch.tensor([position, has_gauss, cached], dtype=torch.float64),
        "random.words": torch.tensor([version, *words], dtype=torch.int64),
        "random.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
    }
    return state | random_state_of_card()


def set_random_state(state: dict[str, torch.Tensor]):
    """random_state() 的逆。"""
    version, *words = state["random.words"].tolist()
    random.setstate((version, tuple(words), *(state["random.gauss"].tolist() or [None])))
    position, has_gauss, cached = state["numpy.rest"].tolist()
    keys = state["numpy.keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), cached))
    torch.set_rng_state(state["torch"])
    set_random_state_of_card(state)
