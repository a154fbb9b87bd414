import os
import subprocess
import sys

import pytest

from handler.engine.capacity import KERNELS
from server import torchserve
from server.torchserve import cpu_quota, environment


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def groups(tmp_path):
    """groups(line of /proc/self/cgroup) -> the quota; groups.root: where control groups lie."""

    def quota(line):
        write(tmp_path / "self", f"{line}\n")
        return cpu_quota(tmp_path / "root", tmp_path / "self")

    quota.root = tmp_path / "root"
    return quota


def test_version_2_the_least_of_a_group_and_those_above_it(groups):
    write(groups.root / "pod/container/cpu.max", "max 100000\n")
    assert groups("0::/pod/container") is None
    write(groups.root / "pod/cpu.max", "250000 100000\n")
    assert groups("0::/pod/container") == 2.5
    write(groups.root / "pod/container/cpu.max", "50000 100000\n")
    assert groups("0::/pod/container") == 0.5


def test_version_1(groups):
    write(groups.root / "cpu/pod/cpu.cfs_quota_us", "-1\n")
    write(groups.root / "cpu/pod/cpu.cfs_period_us", "100000\n")
    assert groups("4:cpu,cpuacct:/pod") is None
    write(groups.root / "cpu/cpu.cfs_quota_us", "150000\n")  # what a container sees as the root
    write(groups.root / "cpu/cpu.cfs_period_us", "100000\n")
    assert groups("4:cpu,cpuacct:/pod") == 1.5
    assert groups("4:memory:/pod") is None


def test_no_control_groups(tmp_path):
    assert cpu_quota(tmp_path, tmp_path / "none") is None


@pytest.mark.parametrize("quota, threads", [(None, None), (0.5, "1"), (3.9, "3")])
def test_no_more_threads_than_the_quota_has_cpus(monkeypatch, tmp_path, quota, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torchserve, "cpu_quota", lambda: quota)
    monkeypatch.setattr(torchserve, "find_java_home", lambda: tmp_path)
    assert environment(tmp_path, tmp_path).get("OMP_NUM_THREADS") == threads
    assert environment(tmp_path, tmp_path)["GOMP_SPINCOUNT"] == "20000"
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "7")
    assert environment(tmp_path, tmp_path)["OMP_NUM_THREADS"] == "7"


def test_workers_keep_no_more_for_themselves_than_is_planned(monkeypatch, tmp_path):
    monkeypatch.setattr(torchserve, "find_java_home", lambda: tmp_path)
    for name in torchserve.MEMORY:
        monkeypatch.delenv(name, raising=False)
    variables = environment(tmp_path, tmp_path)
    assert variables["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == variables["LRU_CACHE_CAPACITY"] == str(KERNELS)
    # Large blocks are returned when they are freed, with holes between them and all.
    code = """if True:
        import pathlib, re
        import torch
        def resident():
            return int(re.search(r"VmRSS:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) << 10
        torch.ones(24 << 18).sum()  # from now on blocks of up to its size would stay
        before, blocks = resident(), [torch.ones(8 << 18) for _ in range(16)]
        del blocks[::2]
        print(resident() - before)
    """
    variables["OMP_NUM_THREADS"] = "1"  # VmRSS is off by megabytes for each core that has touched pages
    printed = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    assert int(printed.stdout) < 9 * (8 << 20)  # of the eight that are left, and not of sixteen
