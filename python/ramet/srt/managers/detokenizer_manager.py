"""Owns the detokenizer process: it turns the scheduler's tokens into text for the tokenizer manager."""

import logging
import os
import shutil
import signal
import sys
from collections import OrderedDict
from collections.abc import Sequence
from types import FrameType

import zmq

from ramet.srt.errors import one_line
from ramet.srt.managers.child_process import (
    ChildConfig,
    die_with_parent,
    read_child_config,
    send_status,
    status_fd_argument,
    take_orders,
)
from ramet.srt.managers.io_struct import (
    BatchStrOutput,
    BatchTokenIDOutput,
    DetokenizerFailed,
    DetokenizerReady,
    DetokenizerRequest,
    FinishReason,
    RequestOutput,
    RequestText,
    decode,
    encode,
)
from ramet.srt.managers.port_args import PortArgs
from ramet.srt.managers.pulse import Pulse, Task
from ramet.srt.managers.watchdog import start_pulse
from ramet.srt.observability.logs import configure_logging
from ramet.srt.text.incremental_decode import IncrementalDecoder, TextStream
from ramet.srt.text.tokenizer import Tokenizer
from ramet.srt.utils.hub import resolve_tokenizer_path

logger = logging.getLogger(__name__)

MAX_EARLY_REQUESTS = 4096  # requests whose tokens may be here before they are announced
POLL_MS = 1000

Sockets = tuple[zmq.Socket[bytes], zmq.Socket[bytes]]  # where the process reads, and where it writes


class Detokenizer:
    """The texts of all running requests. A request is known from its announcement to its last output."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._streams: dict[str, TextStream] = {}
        self._keeps_stop: set[str] = set()  # requests whose stop token's text is wanted
        # The announcement and the tokens come over different connections, so tokens may overtake it.
        self._early: OrderedDict[str, list[RequestOutput]] = OrderedDict()

    def announce(self, request: DetokenizerRequest) -> list[RequestText]:
        """Begin a request; the text of the tokens that were already here."""
        decoder = IncrementalDecoder(self._tokenizer, request.prompt_tail_ids, request.skip_special_tokens)
        self._streams[request.rid] = TextStream(
            decoder, request.stop, min_new_tokens=request.min_new_tokens, keep_stop=request.no_stop_trim
        )
        if request.no_stop_trim:
            self._keeps_stop.add(request.rid)
        return self.push(self._early.pop(request.rid, []))

    def push(self, outputs: Sequence[RequestOutput]) -> list[RequestText]:
        """The outputs with their text; a finished request is forgotten."""
        texts = []
        for output in outputs:
            stream = self._streams.get(output.rid)
            if stream is None:
                self._keep_early(output)
            else:
                texts.append(self._text(stream, output))
        return texts

    def _text(self, stream: TextStream, output: RequestOutput) -> RequestText:
        is_cut = output.ends_in_stop_token and output.rid not in self._keeps_stop
        token_ids = output.token_ids[:-1] if is_cut else output.token_ids
        text = stream.push(token_ids, final=output.finish_reason is not None)
        if output.finish_reason is not None:
            del self._streams[output.rid]
            self._keeps_stop.discard(output.rid)
            if stream.matched is not None and output.finish_reason.type == "length":
                output.finish_reason = FinishReason(type="stop", matched=stream.matched)
        return RequestText(text=text, output=output)

    def _keep_early(self, output: RequestOutput) -> None:
        self._early.setdefault(output.rid, []).append(output)
        if len(self._early) > MAX_EARLY_REQUESTS:
            rid, _ = self._early.popitem(last=False)
            logger.warning("dropped the tokens of request %s, which was never announced", rid)


def run_detokenizer(tokenizer: Tokenizer, sockets: Sockets, parent_pid: int, pulse: Pulse) -> None:
    """Serve until the parent has gone or kills this process.

    Args:
        pulse: of this process; it is to show what the loop is at.
    """
    reader, writer = sockets
    detokenizer = Detokenizer(tokenizer)
    task = Task()
    pulse.serve(lambda: task.since)
    while os.getppid() == parent_pid:
        task.end()
        if not reader.poll(POLL_MS):
            continue
        task.begin()
        message = decode(reader.recv())
        if isinstance(message, DetokenizerRequest):
            texts = detokenizer.announce(message)
        elif isinstance(message, BatchTokenIDOutput):
            texts = detokenizer.push(message.outputs)
        else:
            raise TypeError(f"the detokenizer got a {type(message).__name__}, which it doesn't handle")
        if texts:
            writer.send(encode(BatchStrOutput(outputs=texts)))


def _open_sockets(port_args: PortArgs) -> Sockets:
    """Where this process reads, and where it writes."""
    context = zmq.Context(io_threads=1)
    reader = context.socket(zmq.PULL)
    reader.setsockopt(zmq.RCVHWM, 0)
    if port_args.detokenizer_fd is not None:
        reader.setsockopt(zmq.USE_FD, port_args.detokenizer_fd)
    reader.bind(port_args.detokenizer_ipc_name)
    writer = context.socket(zmq.PUSH)
    writer.setsockopt(zmq.SNDHWM, 0)
    writer.setsockopt(zmq.LINGER, 0)
    writer.setsockopt(zmq.IPV6, 1)
    writer.connect(port_args.tokenizer_ipc_name)
    return reader, writer


def main(argv: Sequence[str]) -> int:
    """Entry of the process; see the launcher in entrypoints/child_processes.py for what it is given."""
    status_fd = status_fd_argument(argv)
    config = read_child_config()
    signal.signal(signal.SIGTERM, _exit_on_signal)
    try:
        die_with_parent(config.parent_pid, signal.SIGTERM)
        return _serve(config, status_fd)
    finally:
        shutil.rmtree(config.directory, ignore_errors=True)  # the launcher does it too, unless it has been killed


def _exit_on_signal(number: int, _frame: FrameType | None) -> None:
    # The kernel sends one more for each thread of the launcher that outlives the one before: they'd end the clean-up.
    signal.signal(number, _ignore)
    raise SystemExit(0)


def _ignore(_number: int, _frame: FrameType | None) -> None:
    pass  # not SIG_IGN: Python would print a warning about a signal that has already come


def _serve(config: ChildConfig, status_fd: int) -> int:
    args = config.make_server_args()
    configure_logging(args.log_level, "detokenizer", args.log_format)
    pulse, _ = start_pulse(config)
    if config.is_spare:
        config = take_orders(status_fd)
        args = config.make_server_args()
    try:
        path = resolve_tokenizer_path(args.tokenizer_path, args.model_path, args.revision)
        tokenizer = Tokenizer.from_path(path)
        sockets = _open_sockets(config.port_args)
    except (ValueError, OSError, MemoryError, RuntimeError, zmq.ZMQError) as error:
        logger.debug("start failed", exc_info=True)
        send_status(status_fd, encode(DetokenizerFailed(message=one_line(error))))
        return 1
    send_status(status_fd, encode(DetokenizerReady()))
    run_detokenizer(tokenizer, sockets, config.parent_pid, pulse)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
