"""Settings of every test run: no network, one thread, models too small to know anything."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: busy waiting starves other processes
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

import modeling_sparrow  # noqa: F401  registers Auto classes and the pipeline

from .tiny import random_model, random_processor

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(scope="session")
def processor():
    return random_processor()


@pytest.fixture
def model():
    """A fresh random model in evaluation mode."""
    return random_model()


@pytest.fixture(scope="session")
def shared_model():
    """A random model that no test may change."""
    return random_model()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, shared_model, processor):
    """Folder with a random model and its processor."""
    folder = tmp_path_factory.mktemp("checkpoint")
    shared_model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
