"""``distserve.v1.InferenceService``: protobuf in and out.

Owns the mapping between ``inference.proto`` and asks and answers. Knows nothing of instances.
"""

from __future__ import annotations

from collections.abc import Sequence

from distserve.core.effects import Account
from distserve.core.types import FinishReason, Token
from distserve.gateway.answer import Answer, AnswerEvent, Ended, Piece
from distserve.gateway.ask import Ask, Chat, Prompt
from distserve.gateway.frontend import FrontEnd, ModelView
from distserve.gateway.plan import Plan, invalid
from distserve.gateway.rpc.calls import Call, Context
from distserve.gateway.text import TextCodec
from distserve.v1 import inference_pb2 as pb
from distserve.v1 import inference_pb2_grpc

_REASONS = {FinishReason.STOP: pb.Finished.REASON_STOP, FinishReason.LENGTH: pb.Finished.REASON_LENGTH}
_NAMES = {"logprobs": "output.logprobs", "stop": "stopping.stop", "stop_token_ids": "stopping.stop_token_ids"}
_STOPPING = {name: f"stopping.{name}" for name in ("max_tokens", "min_tokens")}
_SAMPLING = {
    name: f"sampling.{name}"
    for name in (
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "n",
        "logit_bias",
    )
}
FIELD_NAMES = _NAMES | _STOPPING | _SAMPLING


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Serves one gateway's front end."""

    def __init__(self, front_end: FrontEnd) -> None:
        self._front_end = front_end

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        """Streams the answer. A cancelled call closes it, which cancels the request everywhere."""
        async with Call(context, self._front_end) as call:
            plan = await self._front_end.plan(_ask(request, call))
            answer = await self._front_end.open(plan, call.caller)
            try:
                await call.name(plan.request_id)
                await context.write(pb.GenerateResponse(accepted=_accepted(plan)))
                first = await self._send(answer, context)
                await context.write(pb.GenerateResponse(summary=_summary(answer, first)))
            finally:
                await answer.aclose()

    async def _send(self, answer: Answer, context: Context) -> list[Ended]:
        """Write every event; returns how the choices ended, by index."""
        codec = answer.plan.served.codec
        ends = []
        async for event in answer:
            await context.write(_response(event, codec))
            if isinstance(event, Ended):
                ends.append(event)
        return sorted(ends, key=lambda ended: ended.index)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        async with Call(context, self._front_end):
            match request.WhichOneof("prompt"):
                case "text":
                    prompt: str | Chat = request.text
                case "chat":
                    prompt = _chat(request.chat)
                case _:
                    raise invalid("prompt", "The prompt is missing; set text or chat.")
            special = request.add_special_tokens if request.HasField("add_special_tokens") else True
            ids = await self._front_end.tokenize(request.model, prompt, special)
            limit = self._front_end.model(request.model).max_tokens
            return pb.TokenizeResponse(token_ids=ids, max_model_len=limit)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        async with Call(context, self._front_end):
            text = self._front_end.detokenize(request.model, request.token_ids, request.skip_special_tokens)
            return pb.DetokenizeResponse(text=text)

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        async with Call(context, self._front_end):
            return pb.ListModelsResponse(models=[_served_model(view) for view in self._front_end.models()])


# ── in ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _ask(request: pb.GenerateRequest, call: Call) -> Ask:
    sampling, stopping, output = request.sampling, request.stopping, request.output
    return Ask(
        prompts=(_prompt(request),),
        model=request.model,
        request_id=request.request_id or call.request_id,
        temperature=sampling.temperature if sampling.HasField("temperature") else None,
        top_p=sampling.top_p if sampling.HasField("top_p") else None,
        top_k=sampling.top_k if sampling.HasField("top_k") else None,
        min_p=sampling.min_p if sampling.HasField("min_p") else None,
        repetition_penalty=sampling.repetition_penalty if sampling.HasField("repetition_penalty") else None,
        presence_penalty=sampling.presence_penalty if sampling.HasField("presence_penalty") else None,
        frequency_penalty=sampling.frequency_penalty if sampling.HasField("frequency_penalty") else None,
        seed=sampling.seed if sampling.HasField("seed") else None,
        n=sampling.n if sampling.HasField("n") else None,
        logit_bias=dict(sampling.logit_bias),
        logprobs=output.logprobs if output.HasField("logprobs") else None,
        max_tokens=stopping.max_tokens if stopping.HasField("max_tokens") else None,
        min_tokens=stopping.min_tokens if stopping.HasField("min_tokens") else None,
        stop=tuple(stopping.stop),
        stop_token_ids=tuple(stopping.stop_token_ids),
        ignore_eos=stopping.ignore_eos,
        include_stop=stopping.include_stop_str_in_output,
        skip_special_tokens=output.skip_special_tokens if output.HasField("skip_special_tokens") else True,
        timeout_s=call.time_left_s,
        priority=request.priority,
        tenant=request.tenant,
        slo_class=request.slo_class,
        trace=call.trace,
        names=FIELD_NAMES | {"prompt": request.WhichOneof("prompt") or "prompt"},
    )


def _prompt(request: pb.GenerateRequest) -> Prompt:
    match request.WhichOneof("prompt"):
        case "text":
            return request.text
        case "token_ids":
            return tuple(request.token_ids.ids)
        case "chat":
            return _chat(request.chat)
        case _:
            raise invalid("prompt", "The prompt is missing; set text, token_ids or chat.")


def _chat(chat: pb.ChatPrompt) -> Chat:
    if not chat.messages:
        raise invalid("chat.messages", "The chat has no messages; send at least one.")
    messages = tuple({"role": message.role, "content": message.content} for message in chat.messages)
    prompted = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True
    return Chat(messages, prompted)


# ── out ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _accepted(plan: Plan) -> pb.Accepted:
    return pb.Accepted(
        request_id=plan.request_id,
        model=plan.served.name,
        prompt_tokens=plan.prompt_tokens[0],
        seed=plan.seed,
        max_tokens=plan.requests[0].stopping.max_tokens,
    )


def _response(event: AnswerEvent, codec: TextCodec) -> pb.GenerateResponse:
    if isinstance(event, Piece):
        return pb.GenerateResponse(delta=_delta(event, codec))
    return pb.GenerateResponse(finished=_finished(event))


def _delta(piece: Piece, codec: TextCodec) -> pb.Delta:
    delta = pb.Delta(
        index=piece.index,
        first_token=piece.first_token,
        token_ids=[token.id for token in piece.tokens],
        text=piece.text,
    )
    if piece.tokens and piece.tokens[0].logprob is not None:
        delta.logprobs.extend(_logprob(token, codec) for token in piece.tokens)
    return delta


def _logprob(token: Token, codec: TextCodec) -> pb.TokenLogprob:
    top = [
        pb.TokenLogprob(token_id=token_id, logprob=logprob, token=codec.token_bytes(token_id))
        for token_id, logprob in token.top
    ]
    return pb.TokenLogprob(token_id=token.id, logprob=token.logprob or 0.0, token=codec.token_bytes(token.id), top=top)


def _finished(ended: Ended) -> pb.Finished:
    finished = pb.Finished(index=ended.index, reason=_REASONS[ended.reason], output_tokens=ended.output_tokens)
    if isinstance(ended.matched, str):
        finished.stop = ended.matched
    elif ended.matched is not None:
        finished.stop_token_id = ended.matched
    if ended.account is not None:
        finished.served.CopyFrom(_served(ended.account))
    return finished


def _summary(answer: Answer, ends: Sequence[Ended]) -> pb.Summary:
    account = ends[0].account
    usage = pb.Usage(
        prompt_tokens=sum(answer.plan.prompt_tokens),
        completion_tokens=answer.completion_tokens,
        cached_tokens=account.timings.cached_tokens if account else 0,
    )
    return pb.Summary(usage=usage, served=_served(account) if account else None)


def _served(account: Account) -> pb.Served:
    parts = account.timings
    timings = pb.PhaseTimings(
        gateway_s=parts.gateway_s,
        dispatch_s=parts.dispatch_s,
        queue_s=parts.queue_s,
        prefill_s=parts.prefill_s,
        reserve_s=parts.reserve_s,
        transfer_s=parts.transfer_s,
        decode_queue_s=parts.decode_queue_s,
        ttft_s=account.ttft_s,
        total_s=account.total_s,
    )
    return pb.Served(
        prefill_instance=account.prefill_instance,
        decode_instance=account.decode_instance,
        attempts=account.attempts,
        kv_bytes_moved=parts.kv_bytes_moved,
        timings=timings,
    )


def _served_model(view: ModelView) -> pb.ServedModel:
    spec = view.spec
    return pb.ServedModel(
        name=view.name,
        max_model_len=view.max_tokens,
        vocab_size=spec.vocab_size if spec else 0,
        eos_token_ids=spec.eos_token_ids if spec else (),
        chat=view.codec.has_chat,
        fingerprint=spec.fingerprint if spec else "",
    )
