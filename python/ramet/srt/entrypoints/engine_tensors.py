"""Owns the part of `Engine` that takes weights as tensors, from this program or from trainers, by SGLang's names."""

import base64
import io
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any, TypeAlias

from ramet.srt.entrypoints.engine_weights import EngineWeights
from ramet.srt.entrypoints.generate_request import Output
from ramet.srt.entrypoints.instance import Instance
from ramet.srt.entrypoints.tensor_calls import (
    BeginBody,
    DestroyGroupBody,
    EndBody,
    FromDistributedBody,
    FromIpcBody,
    FromTensorBody,
    InitGroupBody,
    join_group,
    leave_group,
    put_broadcast,
    put_lent,
    put_pickled,
    tensors_answer,
)
from ramet.srt.entrypoints.weight_calls import update_answer
from ramet.srt.managers.update_report import Staged, UpdateReport

if TYPE_CHECKING:
    import torch

NamedTensors: TypeAlias = "Sequence[tuple[str, torch.Tensor]] | Sequence[str]"
Work = Callable[[Instance], Coroutine[Any, Any, UpdateReport | Staged]]
_sharing = threading.Lock()  # held while this program's way of sharing tensors is another one


class EngineTensors(EngineWeights):
    """See `EngineWeights`; errors are the same. Outside of a session a call is an update of its own."""

    def begin_weight_update(self, selector: str = "all") -> None:
        """Open a session: tensors that come from now on are one update, with the next `end_weight_update`."""
        BeginBody.make(selector=selector)
        self._call(lambda instance: instance.weight_sessions.begin())

    def end_weight_update(self, weight_version: str | None = None, *, discard: bool = False) -> Output | None:
        """Serve what has come since the session was opened, on top of what served.

        Args:
            weight_version: a name for what the weights are then; made up if there is none.
            discard: serve nothing of it instead.

        Returns:
            What /end_weight_update answers; None of a session that is discarded.
        """
        body = EndBody.make(weight_version=weight_version, discard=discard)
        if body.discard:
            self._call(lambda instance: instance.weight_sessions.discard())
            return None
        return update_answer(self._call(lambda instance: instance.weight_sessions.end(body.weight_version)))

    def update_weights_from_tensor(
        self, named_tensors: NamedTensors, load_format: str | None = None, **options: Any
    ) -> Output:
        """Take tensors of this program, under the names that checkpoints have. They stay as they are meanwhile.

        Args:
            named_tensors: names with whole tensors, on the CPU, which are put into shared memory in place, or on a
                GPU; or what SGLang's trainers serialise, base64 of it, for each tensor-parallel rank or one for all.
            load_format: None; "direct", of tensors as a rank holds them; "flattened_bucket", of what is serialised.
            options: the other fields of /update_weights_from_tensor: weight_version, abort_all_requests, …

        Returns:
            What /update_weights_from_tensor answers.
        """
        tp_size = self.server_args.tp_size
        texts = list(named_tensors)
        if not all(isinstance(one, str) for one in texts):
            texts = [base64.b64encode(_pickled(texts)).decode() for _ in range(tp_size)]
        body = FromTensorBody.make(serialized_named_tensors=texts, load_format=load_format, **options)
        return self._take(lambda instance: put_pickled(instance, body))

    def init_weights_update_group(
        self,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        group_name: str = "weight_update_group",
        backend: str = "nccl",
        **options: Any,
    ) -> None:
        """Have all ranks join a group in which a trainer is rank 0; returns when all members have come.

        Args:
            rank_offset: rank of this engine's first rank in the group.
            world_size: of the group: the trainer, and all ranks of all engines.
            options: the other fields of /init_weights_update_group: timeout_s.
        """
        body = InitGroupBody.make(
            master_address=master_address,
            master_port=master_port,
            rank_offset=rank_offset,
            world_size=world_size,
            group_name=group_name,
            backend=backend,
            **options,
        )
        self._call(lambda instance: join_group(instance, body))

    def destroy_weights_update_group(self, group_name: str = "weight_update_group") -> None:
        """Leave a group, or stop waiting for its members or for what is broadcast in it."""
        body = DestroyGroupBody.make(group_name=group_name)
        self._call(lambda instance: leave_group(instance, body))

    def update_weights_from_distributed(
        self,
        names: list[str],
        dtypes: Sequence[Any],
        shapes: Sequence[Sequence[int]],
        group_name: str = "weight_update_group",
        load_format: str | None = None,
        **options: Any,
    ) -> Output:
        """Receive what the trainer broadcasts meanwhile, in this order.

        Args:
            dtypes: torch's, or their names.
            load_format: "flattened_bucket": all in one broadcast, byte behind byte.
            options: the other fields of /update_weights_from_distributed: weight_version, timeout_s, …

        Returns:
            What /update_weights_from_distributed answers.
        """
        fields = {
            "names": names,
            "dtypes": [str(dtype) for dtype in dtypes],
            "shapes": [list(shape) for shape in shapes],
            "group_name": group_name,
            "load_format": load_format,
        }

        async def take(instance: Instance) -> UpdateReport | Staged:
            call = instance.trainer_groups.count_call(group_name)  # whatever is wrong with the rest
            return await put_broadcast(instance, FromDistributedBody.make(**fields, **options), call)

        return self._take(take)

    def update_weights_from_ipc(self, zmq_handles: Mapping[str, str], **options: Any) -> Output:
        """Take tensors from buffers that processes of this host lend, as checkpoint-engine does.

        Args:
            zmq_handles: ZeroMQ address for the key of each rank.
            options: the other fields of /update_weights_from_ipc: weight_version, timeout_s, …

        Returns:
            What /update_weights_from_ipc answers.
        """
        body = FromIpcBody.make(zmq_handles=dict(zmq_handles), **options)
        return self._take(lambda instance: put_lent(instance, body))

    def _take(self, work: Work) -> Output:
        return tensors_answer(self._call(work))


def _pickled(named: Sequence[Any]) -> bytes:
    """Names with tensors, such that the ranks can open those that are in this program's memory.

    Raises:
        ValueError: if it is something else.
    """
    import torch

    pairs = [tuple(one) if isinstance(one, tuple | list) else () for one in named]
    if not all(len(pair) == 2 and isinstance(pair[0], str) and torch.is_tensor(pair[1]) for pair in pairs):
        raise ValueError("named_tensors must be names with tensors, or what was serialised of them")
    file = io.BytesIO()
    with _sharing:
        before = torch.multiprocessing.get_sharing_strategy()
        torch.multiprocessing.set_sharing_strategy("file_system")  # descriptors reach a program's own children alone
        try:
            ForkingPickler(file).dump([(name, tensor.detach()) for name, tensor in pairs])
        finally:
            torch.multiprocessing.set_sharing_strategy(before)
    return file.getvalue()
