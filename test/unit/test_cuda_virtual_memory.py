"""Device memory that comes and goes at addresses that stay, with a stand-in for the driver that keeps its rules."""

import contextlib
import ctypes
import gc

import pytest
from ramet.srt.utils import cuda_driver, cuda_virtual_memory
from ramet.srt.utils.cuda_virtual_memory import VirtualMemory, import_for_good, imported

GRANULARITY = 2 << 20
FREE = 4 * GRANULARITY


class Driver:
    """Answers as cuda.h says, and fails the test where a call is against its rules.

    Args:
        refused: the name of a call that fails.
    """

    def __init__(self):
        self.refused = ""
        self.free = FREE
        self.counts = {}  # handle -> references
        self.reserved, self.shown = {}, {}  # address -> bytes, address -> handle
        self.attributes = {102: 1, 103: 1, 110: 1}
        self.waits = 0

    def __call__(self, name, *arguments):
        if name == self.refused:
            raise OSError(f"{name}: refused")
        getattr(self, name)(*(getattr(one, "_obj", one) for one in arguments))

    def cuDeviceGet(self, device, ordinal):
        device.value = ordinal

    def cuDeviceGetAttribute(self, value, attribute, _device):
        value.value = self.attributes[attribute]

    def cuMemGetAllocationGranularity(self, value, properties, _kind):
        assert (properties.kind, properties.handle_kind, properties.location.kind, properties.rdma) == (1, 1, 1, 1)
        value.value = GRANULARITY

    def cuMemAddressReserve(self, address, nbytes, _alignment, wish, _flags):
        assert nbytes % GRANULARITY == 0
        address.value = wish or (1 << 40) + len(self.reserved) * FREE
        self.reserved[address.value] = nbytes

    def cuMemAddressFree(self, address, nbytes):
        assert address not in self.shown and self.reserved.pop(address) == nbytes

    def cuMemCreate(self, handle, nbytes, _properties, _flags):
        if nbytes > self.free:
            raise cuda_driver.DeviceMemoryError("cuMemCreate: out of memory")
        self.free -= nbytes
        handle.value = len(self.counts) + 1
        self.counts[handle.value] = [1, nbytes]

    def cuMemImportFromShareableHandle(self, handle, fd, kind):
        assert kind == 1
        handle.value = fd - 100
        self.counts[handle.value][0] += 1

    def cuMemExportToShareableHandle(self, fd, handle, kind, _flags):
        assert kind == 1 and isinstance(fd, ctypes.c_int)
        fd.value = 100 + handle

    def cuMemRelease(self, handle):
        """A mapping is a reference, too."""
        count = self.counts[handle]
        count[0] -= 1
        if not count[0]:
            self.free += count[1]

    def cuMemMap(self, address, nbytes, offset, handle, _flags):
        assert self.reserved[address] == nbytes and address not in self.shown and not offset
        assert self.counts[handle][0] > 0
        self.counts[handle][0] += 1
        self.shown[address] = handle

    def cuMemSetAccess(self, address, _nbytes, access, count):
        assert address in self.shown and (access.location.kind, access.flags, count) == (1, 3, 1)

    def cuMemUnmap(self, address, _nbytes):
        self.cuMemRelease(self.shown.pop(address))

    def cuCtxSynchronize(self):
        self.waits += 1


@pytest.fixture
def driver(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(cuda_virtual_memory, "call_driver", driver)
    monkeypatch.setattr(cuda_virtual_memory, "primary_context", lambda gpu_id: contextlib.nullcontext())
    yield driver
    gc.collect()
    assert driver.free == FREE and not driver.shown and not driver.reserved


def test_memory_comes_and_goes_and_the_address_stays(driver):
    memory = VirtualMemory(GRANULARITY + 1, 0)
    assert memory.nbytes == 2 * GRANULARITY and driver.free == FREE - memory.nbytes
    interface = memory.__cuda_array_interface__
    assert interface["data"] == (memory.address, False) and interface["shape"] == (memory.nbytes,)
    for _ in range(2):
        memory.give_back()
        memory.give_back()
        assert driver.free == FREE and not memory.is_there and not driver.shown
        memory.take()
        memory.take()
        assert list(driver.shown) == [memory.address] and memory.is_there
    assert driver.waits == 2, "what the GPU is at comes to its end before"


def test_what_does_not_fit_changes_nothing(driver):
    memory = VirtualMemory(FREE, 0)
    with pytest.raises(MemoryError):
        VirtualMemory(1, 0)
    memory.give_back()
    other = VirtualMemory(1, 0)
    with pytest.raises(MemoryError):
        memory.take()
    assert not memory.is_there
    del other
    memory.take()


@pytest.mark.parametrize("refused", ["cuMemMap", "cuMemSetAccess"])
def test_what_the_driver_refuses_leaves_nothing_behind(driver, refused):
    memory = VirtualMemory(1, 0)
    memory.give_back()
    driver.refused = refused
    with pytest.raises(OSError, match=refused):
        memory.take()
    assert driver.free == FREE and not memory.is_there
    driver.refused = ""
    memory.take()


def test_one_range_of_addresses_takes_over_what_another_shows(driver):
    one, other = VirtualMemory(1, 0), VirtualMemory(1, 0)
    kept = driver.shown[other.address]
    one.give_back()
    one.take_over(other)
    assert driver.shown == {one.address: kept} and not other.is_there
    one.give_back()
    other.take()
    driver.refused = "cuMemUnmap"
    with pytest.raises(OSError):
        one.take_over(other)
    assert other.is_there and not one.is_there
    driver.refused = ""


def test_another_process_keeps_what_it_has_imported(driver):
    memory = VirtualMemory(1, 0)
    fd = memory.export()
    with imported(fd, memory.nbytes, 1) as address:
        assert driver.shown[address] == driver.shown[memory.address]
        memory.give_back()
        assert driver.free < FREE
    assert driver.free == FREE


@pytest.mark.parametrize("refused", ["cuMemAddressReserve", "cuMemMap", "cuMemSetAccess"])
def test_what_cannot_be_imported_is_let_go(driver, refused):
    memory = VirtualMemory(1, 0)
    fd = memory.export()
    driver.refused = refused
    with pytest.raises(OSError, match=refused), imported(fd, memory.nbytes, 1):
        pass
    with pytest.raises(OSError, match=refused):
        import_for_good(fd, memory.nbytes, 1)
    driver.refused = ""
    assert list(driver.shown) == [memory.address] and driver.counts[fd - 100][0] == 2


def test_a_transport_process_sees_it_where_it_has_seen_it_before(driver):
    memory = VirtualMemory(1, 0)
    wish = 1 << 41
    assert import_for_good(memory.export(), memory.nbytes, 0, wish) == wish
    driver.cuMemRelease(driver.shown.pop(wish))  # as its end does it
    driver.cuMemRelease(driver.shown[memory.address])
    driver.cuMemAddressFree(wish, memory.nbytes)


def test_a_gpu_without_virtual_memory_is_one_line(driver):
    driver.attributes[103] = 0
    with pytest.raises(OSError, match="GPU 0 has no virtual memory that can be shared"):
        VirtualMemory(1, 0)
