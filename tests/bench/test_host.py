import pytest

from dsv3_tutorial.bench import host


@pytest.fixture
def machine(tmp_path):
    """Write files of a machine that does not exist, and give its root."""

    def write(files):
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return tmp_path

    return write


def test_this_machine_has_a_name_a_core_and_memory():
    assert host.cpu_name()
    assert 1 <= host.allowed_cores() <= host.logical_cores()
    assert host.usable_memory_bytes() is None or host.usable_memory_bytes() > 2**20


def test_a_machine_that_says_nothing_gives_none_and_no_error(machine):
    root = machine({})
    assert host.core_limit(root) is None
    assert host.memory_limit_bytes(root) is None
    assert host.cache_bytes(root) is None
    assert host.cpu_name(root)


def test_two_hyper_threads_are_one_physical_core(machine):
    places = {0: (0, 0), 1: (0, 1), 2: (0, 0), 3: (0, 1), 4: (1, 0)}
    files = {}
    for cpu, (package, core) in places.items():
        folder = f"sys/devices/system/cpu/cpu{cpu}/topology"
        files[f"{folder}/physical_package_id"] = f"{package}\n"
        files[f"{folder}/core_id"] = f"{core}\n"
    assert host.physical_cores(machine(files)) == 3


def test_the_tightest_limit_of_nested_control_groups_holds(machine):
    root = machine(
        {
            "proc/self/cgroup": "0::/user/job\n",
            "sys/fs/cgroup/user/job/cpu.max": "max 100000\n",
            "sys/fs/cgroup/user/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/cpu.max": "400000 100000\n",
            "sys/fs/cgroup/user/job/memory.max": "max\n",
            "sys/fs/cgroup/user/memory.max": "1073741824\n",
        }
    )
    assert host.core_limit(root) == 1.5
    assert host.memory_limit_bytes(root) == host.usable_memory_bytes(root) == 2**30


def test_the_first_version_of_control_groups_is_read_too(machine):
    root = machine(
        {
            "proc/self/cgroup": "4:memory:/job\n3:cpu,cpuacct:/job\n0::/\n",
            "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "536870912\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        }
    )
    assert host.core_limit(root) == 0.5
    assert host.memory_limit_bytes(root) == 2**29


def test_the_largest_cache_is_the_one_that_counts(machine):
    sizes = {"index0": "32K", "index2": "1M", "index3": "32768K", "index9": "odd"}
    folder = "sys/devices/system/cpu/cpu0/cache"
    root = machine({f"{folder}/{name}/size": f"{size}\n" for name, size in sizes.items()})
    assert host.cache_bytes(root) == 32 * 2**20


def test_odd_text_in_these_files_is_no_fact_and_no_error(machine):
    odd = "--1 \x00 many"
    root = machine(
        {
            "proc/cpuinfo": "model name\nmodel name :\n",
            "proc/self/cgroup": "nonsense\n::\n1:cpu\n0::/gone/away\n",
            "sys/fs/cgroup/cpu.max": odd,
            "sys/fs/cgroup/memory.max": odd,
            "sys/devices/system/cpu/cpu0/topology/core_id": odd,
            "sys/devices/system/cpu/cpu0/cache/index0/size": "K",
        }
    )
    assert host.core_limit(root) is None
    assert host.memory_limit_bytes(root) is None
    assert host.cache_bytes(root) is None
    assert host.cpu_name(root)
