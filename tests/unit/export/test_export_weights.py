from __future__ import annotations

import copy
import errno
import json
import os
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.data import CustomDatasetInfo
from timm.models import load_checkpoint
from timm.utils import ModelEmaV3

from timm_alfa.errors import UsageError
from timm_alfa.export import export_checkpoint, export_model


def make_model(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("resnet10t", num_classes=7, in_chans=1, drop_rate=0.1, **kwargs).eval()


@pytest.fixture(scope="module")
def model():
    return make_model()


def assert_same_weights(model, expected):
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_timm_reads_it_in_three_ways(model, tmp_path):
    path = export_model(model, tmp_path / "new" / "folder")
    assert sorted(os.listdir(path.parent)) == ["config.json", "model.safetensors"]
    assert_same_weights(timm.create_model("resnet10t", num_classes=7, in_chans=1, checkpoint_path=str(path)), model)
    other = timm.create_model("resnet10t", num_classes=7, in_chans=1)
    load_checkpoint(other, str(path))
    assert_same_weights(other, model)
    local = timm.create_model(f"local-dir:{path.parent}", pretrained=True)
    assert_same_weights(local, model)
    assert (local.num_classes, local.drop_rate) == (7, 0.0)


def test_config_says_what_the_model_is(model, tmp_path):
    data_config = {"input_size": (1, 64, 64), "mean": (0.3,), "std": (0.2,), "crop_pct": 1.0}
    export_model(model, tmp_path, data_config=data_config)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "resnet10t"
    assert (config["num_classes"], config["num_features"]) == (7, 512)
    assert config["model_args"]["in_chans"] == 1
    recorded = config["pretrained_cfg"]
    assert {name: recorded[name] for name in data_config} == json.loads(json.dumps(data_config))
    assert not {"url", "hf_hub_id", "file"} & recorded.keys()


@pytest.mark.parametrize("names", [list("abcdefg"), ["a", "b"], {0: "a", 6: "g"}])
def test_config_says_what_the_outputs_mean(model, tmp_path, names):
    export_model(model, tmp_path, label_names=names)
    recorded = json.loads((tmp_path / "config.json").read_text())["label_names"]
    assert recorded == json.loads(json.dumps(names))
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    info = CustomDatasetInfo(loaded.pretrained_cfg["label_names"])  # timm's reader of them
    assert [info.index_to_label_name(index) for index in info.label_indices()] == (
        list(names.values()) if isinstance(names, dict) else names
    )
    # a model that is trained on, from these weights
    for others in (["x", "y"], []):
        export_model(loaded, tmp_path / "next", label_names=others)
        config = json.loads((tmp_path / "next" / "config.json").read_text())
        assert (config.get("label_names", []), "label_names" in config["pretrained_cfg"]) == (others, False)
    export_model(loaded, tmp_path / "same")
    again = timm.create_model(f"local-dir:{tmp_path / 'same'}", pretrained=True)
    assert again.pretrained_cfg["label_names"] == loaded.pretrained_cfg["label_names"]


@pytest.mark.parametrize(
    ("recorded", "names"),
    [(["a", "b"], ["a", "b"]), ({1: "b"}, {"1": "b"}), ([], None), ([1], None), ("ab", None), ({"x": "b"}, None)],
)
def test_export_checkpoint_takes_the_names_of_the_checkpoint(model, tmp_path, recorded, names):
    torch.save({"state_dict": model.state_dict(), "label_names": recorded}, tmp_path / "best.pth.tar")
    export_checkpoint(tmp_path / "best.pth.tar", model, tmp_path, use_ema=False)
    assert json.loads((tmp_path / "config.json").read_text()).get("label_names") == names


def test_timm_reads_it_where_this_package_cannot_be_imported(model, tmp_path):
    path = export_model(model, tmp_path)
    script = (
        "import sys; sys.modules['timm_alfa'] = None\n"
        "import timm\n"
        f"timm.create_model('resnet10t', num_classes=7, in_chans=1, checkpoint_path={str(path)!r})\n"
        f"model = timm.create_model('local-dir:{tmp_path}', pretrained=True)\n"
        "print('read', model.num_classes)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.stdout == "read 7\n", done.stderr


def test_wrappers_are_taken_off(model, tmp_path):
    export_model(ModelEmaV3(torch.compile(copy.deepcopy(model), backend="eager")), tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()


def test_channels_last_and_shared_weights(tmp_path):
    model = make_model().to(memory_format=torch.channels_last)
    model.layer2[0].bn1.weight = model.layer2[0].bn2.weight
    stored = load_file(export_model(model, tmp_path))
    assert stored["conv1.0.weight"].is_contiguous()
    torch.testing.assert_close(stored, dict(model.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_export_checkpoint(model, tmp_path, prefix):
    trained, average = make_model(), make_model()
    for value, changed in enumerate((trained, average), start=1):
        torch.nn.init.constant_(changed.fc.bias, value)
    content = {
        "state_dict": {prefix + name: value for name, value in trained.state_dict().items()},
        "state_dict_ema": {prefix + name: value for name, value in average.state_dict().items()},
    }
    torch.save(content, tmp_path / "best.pth.tar")
    before = copy.deepcopy(model.state_dict())
    path = export_checkpoint(tmp_path / "best.pth.tar", model, tmp_path, use_ema=False)
    torch.testing.assert_close(load_file(path), dict(trained.state_dict()), rtol=0, atol=0)
    path = export_checkpoint(tmp_path / "best.pth.tar", model, tmp_path, use_ema=True)
    torch.testing.assert_close(load_file(path), dict(average.state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_export_checkpoint_errors(model, tmp_path):
    checkpoint = tmp_path / "best.pth.tar"
    torch.save({"state_dict": model.state_dict()}, checkpoint)
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"no averaged weights \('state_dict_ema'\)"):
        export_checkpoint(checkpoint, model, out, use_ema=True)
    other = timm.create_model("resnet10t", num_classes=5, in_chans=1)
    with pytest.raises(ValueError, match=r"2 names or shapes differ from the model's, the first is 'fc\.weight'"):
        export_checkpoint(checkpoint, other, out, use_ema=False)
    with pytest.raises(ValueError, match=r"names or shapes differ"):
        export_checkpoint(checkpoint, timm.create_model("resnet18", num_classes=7), out, use_ema=False)
    checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    with pytest.raises(UsageError, match=r"checkpoint .*best\.pth\.tar: truncated"):
        export_checkpoint(checkpoint, model, out, use_ema=False)
    with pytest.raises(ValueError, match=r"expected one built by timm\.create_model, found Linear"):
        export_model(torch.nn.Linear(2, 2), out)
    assert not out.exists()


def test_a_full_disk_leaves_the_older_export(model, tmp_path, monkeypatch):
    export_model(model, tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}

    def fail(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    changed = make_model()
    torch.nn.init.constant_(changed.fc.bias, 3)
    with pytest.raises(OSError, match="No space left"):
        export_model(changed, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before
