"""Arrays on a GPU, which is the build's host driver: a libcuda.so.1 that runs on the CPU."""

import ctypes
import os
import unittest

from .case import Case, psoup

DRIVER = os.path.join(os.environ.get("PSOUP_TEST_BUILD", ""), "host_driver", "libcuda.so.1")


class Tensor(ctypes.Structure):  # DLManagedTensor of dlpack.h
    _fields_ = [("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
                ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
                ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
                ("byte_offset", ctypes.c_uint64), ("manager", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype, new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class Cuda:
    """float32 rows on the device, as a library with DLPack has them."""

    def __init__(self, driver, rows):
        self.driver, self.rows, self.columns = driver, len(rows), len(rows[0])
        flat = (ctypes.c_float * (self.rows * self.columns))(*[x for row in rows for x in row])
        self.address = ctypes.c_ulonglong()
        assert driver.cuMemAlloc_v2(ctypes.byref(self.address), ctypes.c_size_t(ctypes.sizeof(flat))) == 0
        driver.cuMemcpyHtoDAsync_v2(self.address, flat, ctypes.c_size_t(ctypes.sizeof(flat)), None)
        self.shape = (ctypes.c_int64 * 2)(self.rows, self.columns)

    def __dlpack_device__(self):
        return 2, 0

    def __dlpack__(self, stream=None):
        assert stream == -1
        self.tensor = Tensor(self.address.value, 2, 0, 2, 2, 32, 1, self.shape)
        return new_capsule(ctypes.addressof(self.tensor), b"dltensor", None)

    def tolist(self):
        flat = (ctypes.c_float * (self.rows * self.columns))()
        self.driver.cuMemcpyDtoHAsync_v2(flat, self.address, ctypes.c_size_t(ctypes.sizeof(flat)), None)
        return [list(flat[i * self.columns:(i + 1) * self.columns]) for i in range(self.rows)]


@unittest.skipUnless(os.path.exists(DRIVER), "the host driver is not there")
class Gpu(Case):
    @classmethod
    def setUpClass(cls):
        cls.driver = ctypes.CDLL(DRIVER)  # who asks for libcuda.so.1 from now on finds this one
        context = ctypes.c_void_p()  # the device's primary one, as PyTorch makes it current
        cls.driver.cuInit(0)
        cls.driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
        cls.driver.cuCtxSetCurrent(context)

    def setUp(self):
        super().setUp()
        self.context = psoup.Context(device="cuda:0", threads=1)
        self.gpu = psoup.GpuMerge(self.context)
        self.addCleanup(self.context.close)
        self.addCleanup(self.gpu.close)

    def cuda(self, rows):
        return Cuda(self.driver, rows)

    def test_sums(self):
        a, b, out = self.cuda([[1, 2, 3], [4, 5, 6]]), self.cuda([[2, 0, 2], [0, 2, 0]]), self.cuda([[0] * 3] * 2)
        self.assertIs(psoup.merge_sum([a, b], [0.5, 2], out=out, context=self.context), out)
        self.assertEqual(out.tolist(), [[4.5, 1, 5.5], [2, 6.5, 3]])
        psoup.merge_sum([a, b], [1, 1], out=a, context=self.context)
        self.assertEqual(a.tolist(), [[3, 2, 5], [4, 7, 6]])
        with self.assertRaisesRegex(TypeError, "give `out`"):
            psoup.merge_sum([a], [1], context=self.context)
        with self.assertRaisesRegex(psoup.ArgumentError, "is not where the output is"):
            psoup.merge_sum([a], [1], out=memoryview(bytearray(24)).cast("f", (2, 3)), context=self.context)
        with self.assertRaisesRegex(TypeError, "not in the host's memory"):
            psoup.view(a)

    def test_folds(self):
        base, live = self.cuda([[1, 0, 0], [0, 1, 0]]), self.cuda([[9] * 3] * 2)
        factors = [psoup.Factors(self.cuda([[1, 2, 3]]), self.cuda([[1], [2]]), 2.0)]
        for weight in (0.5, 0.25):  # always from the base
            psoup.fold(base, factors, [weight], out=live, context=self.context)
            self.assertEqual(live.tolist(), [[1 + 2 * weight, 4 * weight, 6 * weight],
                                             [4 * weight, 1 + 8 * weight, 12 * weight]])
        with self.assertRaisesRegex(psoup.ArgumentError, "not on the GPU"):
            psoup.fold(base, [psoup.Factors(*[memoryview(bytearray(4 * n * m)).cast("f", (n, m))
                                              for n, m in ((1, 3), (2, 1))])], [1], out=live, context=self.context)

    def test_no_gpu_is_one_line(self):
        for device, words in (("cpu", "the context's device is the CPU"), ("cuda:7", "device cuda:7 is asked for")):
            with psoup.Context(device=device) as context, self.assertRaisesRegex(psoup.Error, words):
                psoup.GpuMerge(context)
        self.gpu.close()
        a = self.cuda([[1]])
        with self.assertRaises(psoup.StateError):
            psoup.merge_sum([a], [1], out=a, context=self.context)


if __name__ == "__main__":
    unittest.main()
