"""Stands in for the part of FlashInfer that the engine calls: the same arguments, computed with plain torch.

Like the real thing it is planned on the host and then runs on what the plan left: with use_cuda_graph on the buffers
given when it was made, which is all that a captured run can see.
"""

from typing import Any

import torch

CALLS: list[tuple[str, str, tuple[Any, ...], dict[str, Any]]] = []  # (class, method, args, kwargs)


class _Wrapper:
    def __init__(self, *args, **kwargs):
        CALLS.append((type(self).__name__, "__init__", args, kwargs))
        self._make(*args, **kwargs)

    def plan(self, *args, **kwargs):
        CALLS.append((type(self).__name__, "plan", args, kwargs))
        self._plan(*args, **kwargs)

    def run(self, *args, **kwargs):
        CALLS.append((type(self).__name__, "run", args, kwargs))
        return self._run(*args, **kwargs)

    def _keep_pages(self, indptr, indices, last_page_len, page_size):
        batch_size = len(last_page_len)
        assert all(t.device.type == "cpu" and t.dtype == torch.int32 for t in (indptr, last_page_len))
        assert indices.dtype == torch.int32 and indices.is_contiguous() and len(indices) == indptr[-1]
        assert indptr.shape == (batch_size + 1,) and (indptr.diff() > 0).all()
        assert ((last_page_len >= 1) & (last_page_len <= page_size)).all()
        self.page_size = page_size
        if self.buffers is None:
            self.pages = indptr.clone(), indices.clone(), last_page_len.clone()
            return
        assert batch_size == len(self.buffers[2]) and len(indices) <= len(self.buffers[1])
        for buffer, values in zip(self.buffers, (indptr, indices, last_page_len), strict=True):
            buffer[: len(values)].copy_(values)
        self.pages = self.buffers

    def _keep_options(self, num_qo_heads, num_kv_heads, head_dim, window_left, dtypes, sm_scale):
        self.shape = num_qo_heads, num_kv_heads, head_dim
        self.window_left, self.dtypes, self.scale = window_left, dtypes, sm_scale

    def _attend(self, q, kv, query_starts, out):
        """Every query sees the keys from its window's first to itself, where the last query is the newest token."""
        indptr, indices, last_page_len = self.pages
        k_cache, v_cache = kv
        assert (q.shape[1], k_cache.shape[2], q.shape[2]) == self.shape
        assert (q.dtype, k_cache.dtype) == self.dtypes and k_cache.shape[1] == self.page_size
        group = q.shape[1] // k_cache.shape[2]
        for index in range(len(last_page_len)):
            pages = indices[indptr[index] : indptr[index + 1]].long()
            length = (len(pages) - 1) * self.page_size + int(last_page_len[index])
            k, v = (cache[pages].flatten(0, 1)[:length].repeat_interleave(group, 1) for cache in (k_cache, v_cache))
            rows = slice(int(query_starts[index]), int(query_starts[index + 1]))
            scores = torch.einsum("qhd,khd->hqk", q[rows].float(), k.float()) * self.scale
            query = torch.arange(length - (rows.stop - rows.start), length)[:, None]
            key = torch.arange(length)
            visible = key <= query
            if self.window_left >= 0:
                visible &= key >= query - self.window_left
            probs = scores.masked_fill(~visible, float("-inf")).softmax(-1)
            out[rows] = torch.einsum("hqk,khd->qhd", probs, v.float()).to(out.dtype)
        return out


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    def _make(
        self,
        float_workspace_buffer,
        kv_layout,
        use_tensor_cores,
        use_cuda_graph=False,
        paged_kv_indptr_buffer=None,
        paged_kv_indices_buffer=None,
        paged_kv_last_page_len_buffer=None,
    ):
        assert float_workspace_buffer.dtype == torch.uint8 and kv_layout == "NHD"
        self.buffers = None
        self.use_tensor_cores = use_tensor_cores
        if use_cuda_graph:
            self.buffers = paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer
            assert len(paged_kv_indptr_buffer) == len(paged_kv_last_page_len_buffer) + 1

    def _plan(
        self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, *,
        window_left=-1, q_data_type, kv_data_type, sm_scale,
    ):  # fmt: skip
        self._keep_pages(indptr, indices, last_page_len, page_size)
        self._keep_options(num_qo_heads, num_kv_heads, head_dim, window_left, (q_data_type, kv_data_type), sm_scale)

    def _run(self, q, paged_kv_cache, *, out):
        assert len(q) == len(self.pages[2])
        return self._attend(q, paged_kv_cache, range(len(q) + 1), out)


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    def _make(self, float_workspace_buffer, kv_layout):
        assert float_workspace_buffer.dtype == torch.uint8 and kv_layout == "NHD"
        self.buffers = None

    def _plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads,
        head_dim_qk, page_size, *, causal, window_left=-1, q_data_type, kv_data_type, sm_scale,
    ):  # fmt: skip
        assert causal and qo_indptr.device.type == "cpu" and qo_indptr.dtype == torch.int32
        assert qo_indptr.shape == paged_kv_indptr.shape and (qo_indptr.diff() > 0).all()
        self.query_starts = qo_indptr.clone()
        self._keep_pages(paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, page_size)
        self._keep_options(num_qo_heads, num_kv_heads, head_dim_qk, window_left, (q_data_type, kv_data_type), sm_scale)

    def _run(self, q, paged_kv_cache, *, out):
        assert len(q) == self.query_starts[-1]
        return self._attend(q, paged_kv_cache, self.query_starts.tolist(), out)


class BatchMLAPagedAttentionWrapper(_Wrapper):
    """Of the module flashinfer.mla."""

    def _make(
        self, float_workspace_buffer, use_cuda_graph=False, qo_indptr=None, kv_indptr=None, kv_indices=None,
        kv_len_arr=None,
    ):  # fmt: skip
        assert float_workspace_buffer.dtype == torch.uint8
        self.buffers = None
        if use_cuda_graph:
            self.buffers = qo_indptr, kv_indptr, kv_indices, kv_len_arr
            assert len(qo_indptr) == len(kv_indptr) == len(kv_len_arr) + 1

    def _plan(
        self, qo_indptr, kv_indptr, kv_indices, kv_len_arr, num_heads, head_dim_ckv, head_dim_kpe, page_size, causal,
        sm_scale, q_data_type, kv_data_type,
    ):  # fmt: skip
        parts = qo_indptr, kv_indptr, kv_indices, kv_len_arr
        assert all(part.dtype == torch.int32 for part in parts) and causal
        assert all(part.device.type == "cpu" for part in (qo_indptr, kv_indptr, kv_len_arr))
        assert torch.equal(kv_indptr.diff(), (kv_len_arr + page_size - 1) // page_size)
        if self.buffers is None:
            self.pages = [part.clone() for part in parts]
        else:
            assert len(kv_len_arr) == len(self.buffers[3])
            for buffer, part in zip(self.buffers, parts, strict=True):
                buffer[: len(part)].copy_(part)
            self.pages = self.buffers
        self.sizes, self.page_size, self.scale = (num_heads, head_dim_ckv, head_dim_kpe), page_size, sm_scale
        self.dtypes = q_data_type, kv_data_type

    def _run(self, q_nope, q_pe, ckv_cache, kpe_cache, *, out):
        heads, rank, rope = self.sizes
        assert q_nope.shape[1:] == (heads, rank) and q_pe.shape[1:] == (heads, rope)
        assert ckv_cache.shape[1:] == (self.page_size, rank) and kpe_cache.shape[1:] == (self.page_size, rope)
        assert (q_nope.dtype, ckv_cache.dtype) == self.dtypes and out.shape == q_nope.shape
        query_starts, starts, indices, lengths = self.pages
        q, cache = (torch.cat(parts, -1).float() for parts in ((q_nope, q_pe), (ckv_cache, kpe_cache)))
        for index, length in enumerate(lengths.tolist()):
            rows = cache[indices[starts[index] : starts[index + 1]].long()].flatten(0, 1)[:length]
            part = slice(int(query_starts[index]), int(query_starts[index + 1]))
            scores = torch.einsum("qhd,kd->hqk", q[part], rows) * self.scale
            unseen = torch.arange(length) > torch.arange(length - (part.stop - part.start), length)[:, None]
            probs = scores.masked_fill(unseen, float("-inf")).softmax(-1)
            out[part] = torch.einsum("hqk,kd->qhd", probs, rows[:, :rank]).to(out.dtype)
        return out
