import json
import subprocess
import sys

CODE = """
import socket, sys, json
def refuse(*a, **k): raise RuntimeError("network at import")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import data_handler, torch
names = ("lightning", "pytorch_lightning", "hydra", "omegaconf", "wandb", "datasets", "bitnet_arch", "wrinklefree")
print(json.dumps([[n for n in names if n in sys.modules], torch.cuda.is_initialized(), data_handler.BatchLoader.__name__]))
"""


def test_importing_brings_no_trainer_no_network_and_no_accelerator():
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == [[], False, "BatchLoader"]
