"""The flags of every command. Server commands take theirs from the options dataclasses (``cli.options``)."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from distserve.cli.parser import add_settings
from distserve.launch.words import settings

DEFAULT_SERVER = "127.0.0.1:50051"
SHELLS = ("bash", "zsh", "fish")
_SLO = "seconds: ttft=0.25,tpot=0.1,attainment=0.9; repeated for classes: chat:ttft=0.25,tpot=0.1[,max_prompt=512]"


def serve(parser: argparse.ArgumentParser) -> None:
    _server(parser, "serve")
    parser.add_argument("--plan", type=Path, metavar="FILE", help="instances and limits from a plan (`distserve plan`)")
    parser.add_argument("--parent-fd", type=int, default=None, help=argparse.SUPPRESS)


def gateway(parser: argparse.ArgumentParser) -> None:
    _server(parser, "gateway")
    _descriptors(parser)


def controller(parser: argparse.ArgumentParser) -> None:
    _server(parser, "controller")
    _descriptors(parser)


def instance(parser: argparse.ArgumentParser) -> None:
    _server(parser, "instance")
    _descriptors(parser)


def _server(parser: argparse.ArgumentParser, command: str) -> None:
    parser.usage = f"distserve {command} [OPTION …]"
    parser.add_argument("--config", type=Path, metavar="FILE", help="a YAML file of options (or DISTSERVE_CONFIG)")
    parser.add_argument("--check-config", action="store_true", help="print the options in force as YAML, start nothing")
    add_settings(parser, settings(command))


def _descriptors(parser: argparse.ArgumentParser) -> None:
    for flag in ("--ready-fd", "--parent-fd"):
        parser.add_argument(flag, type=int, default=None, help=argparse.SUPPRESS)


def demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2-135m", help="as for serve [%(default)s]")
    parser.add_argument("--prompt", default="What is the capital of France?", help="the question [%(default)s]")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="longest answer [%(default)s]")
    parser.add_argument("--plain", action="store_true", help="no colours")


def _client(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--server",
        default=os.environ.get("DISTSERVE_SERVER", DEFAULT_SERVER),
        metavar="HOST:PORT",
        help="gRPC address of a gateway (or DISTSERVE_SERVER) [%(default)s]",
    )
    parser.add_argument(
        "--api-key", default=os.environ.get("DISTSERVE_API_KEY", ""), metavar="KEY", help="or DISTSERVE_API_KEY"
    )
    _tls(parser)
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="give up after [%(default)s]")
    parser.add_argument("--plain", action="store_true", help="no colours")


def _tls(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    parser.add_argument(
        "--tls-ca",
        default=os.environ.get("DISTSERVE_TLS_CA", ""),
        metavar="FILE",
        help="the server speaks TLS, with a certificate of this CA (or DISTSERVE_TLS_CA); system: of a public one",
    )


def _sampling(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    parser.add_argument("--model", default="", help="which model, when the cluster serves several")
    parser.add_argument("--max-tokens", type=int, default=max_tokens, metavar="N", help="longest answer [%(default)s]")
    parser.add_argument("--temperature", type=float, default=None, metavar="T", help="0 is greedy [1]")
    parser.add_argument("--top-p", type=float, default=None, metavar="P")
    parser.add_argument("--top-k", type=int, default=None, metavar="K")
    parser.add_argument("--min-p", type=float, default=None, metavar="P")
    parser.add_argument("--seed", type=int, default=None, metavar="N", help="make the answer repeatable")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the answer here (repeatable)")


def generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help="the prompt; - reads it from standard input")
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    parser.add_argument("--system", default="", metavar="TEXT", help="a system message (implies --chat)")
    parser.add_argument("--ignore-eos", action="store_true", help="go on past the model's own end")
    parser.add_argument("--request-id", default="", metavar="ID", help="name the request, for `distserve where`")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a stream")
    parser.add_argument("--quiet", action="store_true", help="print the answer alone, no account")
    _sampling(parser, 256)
    _client(parser)


def chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", default="", metavar="TEXT", help="a system message")
    _sampling(parser, 512)
    _client(parser)


def ps(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    _client(parser)


def where(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("request_id", metavar="REQUEST_ID")
    parser.add_argument("--json", action="store_true", help="JSON instead of words")
    _client(parser)


def cancel(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("request_id", metavar="REQUEST_ID")
    _client(parser)


def kvcheck(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--idle", action="store_true", help="also fail unless every block is free")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    _client(parser)


def record(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="FILE", required=True, help="the trace: .jsonl, or .jsonl.gz")
    parser.add_argument("--duration", type=float, default=600.0, metavar="S", help="seconds of arrivals (default 600)")
    _client(parser)


def key(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action", choices=("create", "list", "remove", "secret"), help="create: prints the key, once; secret: see NAME"
    )
    parser.add_argument("name", metavar="NAME", nargs="?", default="", help="whose key; of `secret`: the file to make")
    parser.add_argument(
        "--api-keys",
        default=os.environ.get("DISTSERVE_API_KEYS"),
        metavar="FILE",
        help="the file that gateways read (or DISTSERVE_API_KEYS); holds hashes only",
    )
    parser.add_argument("--admin", action="store_true", help="create: the key may use ps, where, cancel, kvcheck, too")
    parser.add_argument(
        "--max-streams", type=int, default=0, metavar="N", help="create: answers at once [--max-client-streams]"
    )
    parser.add_argument("--plain", action="store_true", help="no colours")


def cert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("create",), help="create: a certificate, and a CA if there is none")
    parser.add_argument("directory", metavar="DIR", type=Path, help="for --tls-dir; run again to renew")
    parser.add_argument("--hosts", default="", metavar="A,B", help="names, addresses; localhost, distserve always are")
    parser.add_argument("--ca-dir", type=Path, default=None, metavar="DIR", help="sign with the CA of this directory")
    parser.add_argument("--days", type=int, default=365, metavar="N", help="it is good for so long [%(default)s]")


def model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("path",), help="path: print the directory, converting it first if needed")
    parser.add_argument("name", metavar="NAME", help="an alias, a directory, or a .gguf file")


def completion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="e.g.: source <(distserve completion bash)")


def bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", required=True, help="the server, such as http://127.0.0.1:8000")
    parser.add_argument("--model", required=True, metavar="NAME", help="the name the server knows the model by")
    _bench_load(parser.add_argument_group("load: what is sent and when"))
    _bench_target(parser.add_argument_group("targets"))
    other = parser.add_argument_group("other")
    other.add_argument("--json", type=Path, default=None, metavar="OUT", help="write everything here, too")
    other.add_argument("--api-key", default=os.environ.get("DISTSERVE_API_KEY", ""), metavar="KEY")
    _tls(other)
    other.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="of one request [%(default)s]")
    other.add_argument("--warmup", type=int, default=3, metavar="N", help="requests before measuring [%(default)s]")
    other.add_argument("--seed", type=int, default=1, metavar="N", help="of prompts and arrivals [%(default)s]")
    other.add_argument("--temperature", type=float, default=0.0, metavar="T", help="[%(default)s]")
    other.add_argument("--no-ignore-eos", action="store_true", help="let answers end early (lengths then vary)")
    other.add_argument("--count-empty", action="store_true", help="count messages without text as tokens")
    other.add_argument("--extra", default="{}", metavar="JSON", help="fields to add to every request body")
    other.add_argument(
        "--server-pid", type=int, action="append", default=[], metavar="PID", help="report its CPU use (repeatable)"
    )
    other.add_argument("--plain", action="store_true", help="no colours, no progress line")


def _bench_load(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--requests", type=Path, metavar="FILE", help="JSONL of prompts (schema: bench/README.md)")
    group.add_argument("--rate", type=float, metavar="R", help="Poisson arrivals, requests per second")
    group.add_argument("--duration", type=float, metavar="S", help="seconds of arrivals")
    group.add_argument("--num-requests", type=int, metavar="N", help="how many requests, instead of --duration")
    group.add_argument("--concurrency", type=int, metavar="N", help="keep N in flight, instead of --rate")
    group.add_argument("--input-tokens", type=int, default=256, metavar="N", help="of made-up prompts [%(default)s]")
    group.add_argument("--output-tokens", type=int, default=64, metavar="N", help="of answers [%(default)s]")
    group.add_argument(
        "--tokenizer", default="", metavar="NAME", help="the model's directory, alias or tokenizer.json: exact lengths"
    )


def _bench_target(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--slo", default="", metavar="TARGETS", help="ttft=1.0,tpot=0.1[,e2e=…][,attainment=0.9]")
    group.add_argument("--goodput", action="store_true", help="search the highest rate that meets --slo")
    group.add_argument("--tolerance", type=float, default=0.1, metavar="X", help="of the goodput found [%(default)s]")
    group.add_argument("--max-rate", type=float, default=200.0, metavar="R", help="of the search [%(default)s]")
    group.add_argument(
        "--min-requests", type=int, default=30, metavar="N", help="in a point of the search [%(default)s]"
    )
    group.add_argument(
        "--max-requests", type=int, default=400, metavar="N", help="in a point of the search [%(default)s]"
    )


def plan(parser: argparse.ArgumentParser) -> None:
    need = parser.add_argument_group("the question")
    need.add_argument("--model", required=True, metavar="NAME", help="such as llama-3.1-8b, or a config.json")
    need.add_argument("--cluster", required=True, type=Path, metavar="FILE", help="nodes, GPUs and links, as YAML")
    need.add_argument("--trace", type=Path, default=None, metavar="FILE", help="recorded traffic")
    need.add_argument("--workload", default="", metavar="NAME", help="instead of a trace: sharegpt, constant:512/64")
    need.add_argument(
        "--arrivals",
        default="poisson",
        metavar="HOW",
        help="of a workload: poisson, gamma:CV, varying:0=1,600=3 (from second = times the rate) [%(default)s]",
    )
    need.add_argument("--rate", required=True, type=float, metavar="R", help="requests a second to plan for")
    need.add_argument("--slo", required=True, action="append", metavar="LIMITS", help=_SLO)
    how = parser.add_argument_group("how")
    how.add_argument("--algorithm", default="auto", metavar="auto|high|low", help="node affinity [%(default)s]")
    how.add_argument(
        "--objective", default="goodput", metavar="goodput|cost|fewest", help="per GPU, per dollar [%(default)s]"
    )
    how.add_argument(
        "--profile", default="tables", metavar="NAME", help="tables, distserve:a100-80g, a profile.json [%(default)s]"
    )
    how.add_argument("--engine", default="vllm", metavar="NAME", help="overheads beside tables [%(default)s]")
    how.add_argument("--mixed-profile", default="", metavar="NAME", help="of colocated instances [the same]")
    how.add_argument("--policy", default="", metavar="NAME", help="batching limits [the profile's engine's]")
    how.add_argument("--requests", type=int, default=2000, metavar="N", help="a trial while choosing [%(default)s]")
    how.add_argument(
        "--final-requests", type=int, default=6000, metavar="N", help="a trial of a finalist [%(default)s]"
    )
    how.add_argument("--top", type=int, default=4, metavar="N", help="finalists [%(default)s]")
    how.add_argument("--unit-gpus", type=int, default=8, metavar="N", help="of the largest unit tried [%(default)s]")
    how.add_argument("--seed", type=int, default=0, metavar="N", help="[%(default)s]")
    how.add_argument("--workers", type=int, default=1, metavar="N", help="processes [%(default)s]")
    how.add_argument(
        "--resume", type=Path, default=None, metavar="FILE", help="keep measurements here and go on from them"
    )
    put = parser.add_argument_group("results")
    put.add_argument("--out", required=True, type=Path, metavar="FILE", help="plan.yaml")
    put.add_argument(
        "--report", type=Path, default=None, metavar="FILE", help="an HTML report with plots (needs matplotlib)"
    )
    put.add_argument("--json", type=Path, default=None, metavar="OUT", help="the plan and every candidate")


def simulate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="NAME", help="such as opt-13b")
    parser.add_argument(
        "--profile", required=True, metavar="NAME", help="latencies: distserve:a100-80g, or this machine's profile.json"
    )
    shapes = parser.add_argument_group("instances: tp=2,pp=1,n=1 (each 1 unless given)")
    shapes.add_argument("--prefill", default="", metavar="SHAPE", help="prefill instances")
    shapes.add_argument("--decode", default="", metavar="SHAPE", help="decode instances")
    shapes.add_argument("--mixed", default="", metavar="SHAPE", help="colocated instances, instead of the other two")
    shapes.add_argument(
        "--policy",
        default="",
        metavar="NAME",
        help="chunked, serve, prompts-first, distserve, vllm-2023 [the profile's]",
    )
    shapes.add_argument("--max-mixed-tokens", type=int, default=None, metavar="N", help="as of serve [the policy's]")
    shapes.add_argument(
        "--overflow-prefill-tokens", type=int, default=0, metavar="N", help="as of serve [%(default)s: off]"
    )
    shapes.add_argument("--prefix-cache", action="store_true", help="prompts share KV as the trace's prefixes tell")
    shapes.add_argument("--kv-tokens", type=int, default=0, metavar="N", help="KV room of an instance [the profile's]")
    shapes.add_argument(
        "--kv-bandwidth", type=float, default=228.0, metavar="GB/S", help="of an instance's link [%(default)s]"
    )
    load = parser.add_argument_group("load and targets")
    load.add_argument(
        "--requests", type=Path, required=True, metavar="FILE", help="[[prompt, output, arrival_s], …] or a trace file"
    )
    load.add_argument("--rate", type=float, metavar="R", help="stretch time to this mean rate")
    load.add_argument("--slo", required=True, action="append", metavar="LIMITS", help=_SLO)
    load.add_argument("--seed", type=int, default=0, metavar="N", help="[%(default)s]")
    load.add_argument("--json", type=Path, metavar="OUT", help="write attainment and every request's times here")
    load.add_argument("--out", type=Path, metavar="FILE", help="write a plan of this, with the profile of a machine")
