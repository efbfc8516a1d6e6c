"""Metrics in Prometheus' format. Nothing is kept per frame: streams count in plain integers, and a scrape adds them up.

Labels are names out of the configuration and constant words of ours; never a call, a number, or whatever a peer makes up.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import add
from typing import NamedTuple

from msgspec import Struct
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from gateway import __version__
from gateway.buckets import DURATION_SECS, LATENCY_SECS, WAIT_SECS, Buckets
from gateway.figures import Figures
from gateway.listeners import ListenerFigures
from gateway.watchdog import LAG_SECS, Watchdog

MOST_SERIES = 200
"""Of one metric; what comes beyond them is summed up in one more, whose last label is `other`."""

AUTH = frozenset({"signature", "replay", "token", "token_used", "other_call"})
"""Refusals of whoever could not prove who they are."""

Labels = tuple[str, ...]


class Family(NamedTuple):
    """A metric: what it counts, and by which labels."""

    help: str
    labels: Labels = ()


class Gauge(NamedTuple):
    """The same of a gauge, and what it is of several workers: the sum, the greatest or the least."""

    help: str
    labels: Labels = ()
    join: Callable[[float, float], float] = add


class Spread(NamedTuple):
    """The same of a histogram, and its bounds."""

    bounds: tuple[float, ...]
    help: str
    labels: Labels = ()


COUNTERS = {
    "telephony_calls": Family("Streams that were let in and have ended, by how", ("provider", "result")),
    "telephony_unstarted": Family("Connections that were let in and never sent a start frame", ("provider",)),
    "telephony_streams_lost": Family("Streams whose carrier's connection was lost while the call went on", ("provider",)),
    "telephony_streams_reattached": Family("Streams that took up a call whose last stream was lost", ("provider",)),
    "telephony_calls_not_journaled": Family("Streams that could not be taken up if they were lost", ("provider",)),
    "telephony_frames": Family("WebSocket messages from (in) and to (out) carriers", ("provider", "direction")),
    "telephony_bad_frames": Family("Frames that could not be read or used, and were skipped", ("provider", "reason")),
    "telephony_unknown_frames": Family("Well-formed frames of a kind that the codec does not know", ("provider",)),
    "telephony_gap_seconds": Family("Audio that the carrier's timestamps left out", ("provider",)),
    "telephony_media_stalls": Family("How often a carrier sent no audio for 3 s while its connection lived", ("provider",)),
    "telephony_dropped_seconds": Family("Callers' audio that no service got and none will get", ("provider",)),
    "telephony_playout_refused_seconds": Family("Services' audio that found the playout queue full", ("provider",)),
    "telephony_underruns": Family("Holes in what was meant to be played as one piece", ("provider",)),
    "telephony_checkpoints": Family("Checkpoints, by what became of the audio before them", ("provider", "outcome")),
    "telephony_faults": Family("Refusals that services were told of, the carriers' own among them", ("provider", "code")),
    "telephony_service_losses": Family("Connections to services that were lost in mid-call", ("service",)),
    "telephony_listeners_lost": Family("Listeners that were given up in mid-call", ("service",)),
    "telephony_listener_dropped_seconds": Family("Audio that listeners did not get and will not get", ("service",)),
    "telephony_refusals": Family("Calls and connections that were not let in for want of room", ("provider", "reason")),
    "telephony_api_requests": Family(
        "Requests to carriers' APIs: place, hangup or transfer; done, over, refused, failed, or unknown where no answer came",
        ("provider", "request", "result"),
    ),
    "telephony_reloads": Family("Readings of the configuration while calls went on, by outcome", ("outcome",)),
    "telephony_event_loop_blocked": Family("How often the event loop was late by more than 100 ms"),
    "telephony_worker_exits": Family("Workers that have ended: asked to, or of themselves (died)", ("how",)),
    "telephony_auth_failures": Family("Requests without a good signature, token or password", ("provider", "reason")),
}
"""Their names as Prometheus has them end in `_total`."""

HISTOGRAMS = {
    "telephony_call_seconds": Spread(DURATION_SECS, "How long calls' streams lasted", ("provider",)),
    "telephony_call_setup_seconds": Spread(WAIT_SECS, "From a carrier's connection until a service took it", ("provider",)),
    "telephony_added_latency_seconds": Spread(
        LATENCY_SECS,
        "From socket to socket, of one frame in eleven: callers' audio (to_service), services' live audio (to_caller)",
        ("provider", "direction"),
    ),
    "telephony_time_to_silence_seconds": Spread(LATENCY_SECS, "From a clear until the carrier was told", ("provider",)),
    "telephony_event_loop_lag_seconds": Spread(LAG_SECS, "How late the event loop was, looked at twenty times a second"),
    "telephony_service_recovery_seconds": Spread(WAIT_SECS, "How long services were away that came back", ("service",)),
}

GAUGES = {
    "telephony_build_info": Gauge("Which version this is; always 1", ("version", "python"), max),
    "telephony_calls_active": Gauge("Streams that were let in and have not ended", ("provider",)),
    "telephony_call_slots": Gauge("Calls that count against the limit: active ones, and those whose stream is due"),
    "telephony_call_slots_limit": Gauge("max_calls", join=max),
    "telephony_connections_pending": Gauge("Carriers' connections that have not sent their start frame"),
    "telephony_service_calls": Gauge("Calls by the service that has them, or is to have them", ("service", "state")),
    "telephony_service_lag_max_seconds": Gauge(
        "Callers' audio that a service is behind, of the call that is most", ("service",), max
    ),
    "telephony_listener_calls": Gauge("Calls that a service listens to, or is to", ("service", "state")),
    "telephony_listener_lag_max_seconds": Gauge(
        "Audio that waits for a listener, on the call where it is most", ("service",), max
    ),
    "telephony_playout_queued_seconds": Gauge("Audio that waits to be played, over all calls", ("provider",)),
    "telephony_playout_queued_max_seconds": Gauge("The same, of the call that has most", ("provider",), max),
    "telephony_load_ratio": Gauge(
        "Used of what there is: cpu (by this process, of one processor), host_cpu, memory (of the limit)", ("resource",), max
    ),
    "telephony_workers": Gauge("Worker processes: live ones, and those that let their calls end (leaving)", ("state",)),
    "telephony_draining": Gauge("1 while the process ends its calls and takes no new ones", join=max),
    "telephony_tls_expiry_timestamp_seconds": Gauge("When our own certificate expires, in seconds since 1970", join=min),
    "telephony_event_loop_lag_worst_seconds": Gauge("The event loop's greatest lag within ten seconds", join=max),
}

PROCESS_JOINS: dict[str, Callable[[float, float], float]] = {
    "process_start_time_seconds": min,
    "process_max_fds": min,
}
"""Of the metrics of processes those that are not summed up."""


class Packed(Struct):
    """`Sums` for another process."""

    counts: dict[str, list[tuple[Labels, float]]]
    spreads: dict[str, list[tuple[Labels, list[int], float]]]
    gauges: dict[str, list[tuple[Labels, float]]]
    process: dict[str, float] = {}
    """Of the process itself, by name."""


class Sums:
    """Counters and histograms by name and labels."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[Labels]] = {name: Counter() for name in COUNTERS}
        self.spreads: dict[str, dict[Labels, Buckets]] = {name: {} for name in HISTOGRAMS}
        self.gauges: dict[str, dict[Labels, float]] = {name: {} for name in GAUGES}

    def count(self, name: str, *labels: str, by: float = 1) -> None:
        counter = self.counts[name]
        counter[_capped(labels, counter)] += by  # type: ignore[assignment]  # a Counter of floats is one too

    def spread(self, name: str, *labels: str, by: Buckets) -> None:
        known = self.spreads[name]
        known.setdefault(_capped(labels, known), Buckets(by.bounds)).merge(by)

    def raise_(self, name: str, *labels: str, by: float, most: bool = False) -> None:
        """A gauge by so much, or with `most` to so much unless it is higher already."""
        gauge = self.gauges[name]
        labels = _capped(labels, gauge)
        before = gauge.get(labels, 0.0)
        gauge[labels] = max(before, by) if most else before + by

    def copy(self) -> Sums:
        twin = Sums()
        for name, counter in self.counts.items():
            twin.counts[name] = Counter(counter)
        for name, spreads in self.spreads.items():
            for labels, buckets in spreads.items():
                twin.spread(name, *labels, by=buckets)
        return twin

    def merge(self, other: Sums, *, gauges: bool = True) -> None:
        """Add what another process has counted; without `gauges` it is one that has ended, and holds nothing."""
        for name, counter in other.counts.items():
            for labels, value in counter.items():
                self.count(name, *labels, by=value)
        for name, spreads in other.spreads.items():
            for labels, buckets in spreads.items():
                self.spread(name, *labels, by=buckets)
        for name, values in other.gauges.items() if gauges else ():
            mine = self.gauges[name]
            for labels, level in values.items():
                labels = _capped(labels, mine)
                mine[labels] = GAUGES[name].join(mine[labels], level) if labels in mine else level

    def pack(self) -> Packed:
        return Packed(
            {name: [*values.items()] for name, values in self.counts.items() if values},
            {name: [(labels, each.counts, each.sum) for labels, each in of.items()] for name, of in self.spreads.items() if of},
            {name: [*values.items()] for name, values in self.gauges.items() if values},
        )

    @classmethod
    def unpack(cls, packed: Packed) -> Sums:
        """What `pack` had. What only another version knows is left out."""
        sums = cls()
        for name, values in packed.counts.items():
            if name in COUNTERS:
                sums.counts[name].update(dict(values))
        for name, spreads in packed.spreads.items():
            if name in HISTOGRAMS and all(len(counts) == len(HISTOGRAMS[name].bounds) + 1 for _, counts, _ in spreads):
                for labels, counts, total in spreads:
                    buckets = sums.spreads[name][labels] = Buckets(HISTOGRAMS[name].bounds)
                    buckets.counts, buckets.sum = counts, total
        for name, values in packed.gauges.items():
            if name in GAUGES:
                sums.gauges[name].update(dict(values))
        return sums

    def stream(self, figures: Figures) -> None:
        """What a stream, live or ended, has counted."""
        name, rate = figures.provider, figures.sample_rate
        self.count("telephony_frames", name, "in", by=figures.frames_in)
        self.count("telephony_frames", name, "out", by=figures.frames_out)
        for reason, count in figures.bad.items():
            self.count("telephony_bad_frames", name, reason, by=count)
        if figures.unknown:
            self.count("telephony_unknown_frames", name, by=sum(figures.unknown.values()))
        for code, count in figures.faults.items():
            self.count("telephony_faults", name, code, by=count)
        for outcome, count in figures.outcomes.items():
            self.count("telephony_checkpoints", name, outcome, by=count)
        self.count("telephony_gap_seconds", name, by=figures.gap_ms / 1000)
        self.count("telephony_underruns", name, by=figures.underruns)
        if rate:
            self.count("telephony_dropped_seconds", name, by=figures.dropped / rate)
            self.count("telephony_playout_refused_seconds", name, by=figures.refused / rate)
        watch = figures.stopwatch
        self.spread("telephony_added_latency_seconds", name, "to_service", by=watch.to_service)
        self.spread("telephony_added_latency_seconds", name, "to_caller", by=watch.to_caller)
        self.spread("telephony_time_to_silence_seconds", name, by=watch.to_silence)
        for link in figures.links:
            for service, count in link.losses.items():
                self.count("telephony_service_losses", service, by=count)
            for service, outages in link.outages.items():
                self.spread("telephony_service_recovery_seconds", service, by=outages)

        self.listeners(figures.listeners)

    def listeners(self, listeners: Iterable[ListenerFigures], *, sign: int = 1) -> None:
        """What listeners have missed, and which are lost; with `sign=-1` it is taken back."""
        for each in listeners:
            self.count("telephony_listener_dropped_seconds", each.name, by=sign * each.dropped_ms / 1000)
            self.count("telephony_listeners_lost", each.name, by=sign * (each.state == "lost"))

    def live(self, figures: Figures) -> None:
        """What a stream holds at the moment."""
        if not figures.entered:
            return
        name, link = figures.provider, figures.link
        self.raise_("telephony_calls_active", name, by=1)
        self.raise_("telephony_playout_queued_seconds", name, by=figures.queued_ms / 1000)
        self.raise_("telephony_playout_queued_max_seconds", name, by=figures.queued_ms / 1000, most=True)
        if link is not None:
            self.raise_("telephony_service_calls", link.service, link.state, by=1)
            self.raise_("telephony_service_lag_max_seconds", link.service, by=link.lag_ms / 1000, most=True)
        for each in figures.listeners:
            if each.state not in ("lost", "done"):
                self.raise_("telephony_listener_calls", each.name, each.state, by=1)
                self.raise_("telephony_listener_lag_max_seconds", each.name, by=each.lag_ms / 1000, most=True)


class Totals:
    """Sums over the streams that have ended, and of what belongs to no stream."""

    def __init__(self) -> None:
        self.sums = Sums()

    def end(self, figures: Figures) -> None:
        """A stream has ended, and is not among the live ones any more."""
        sums, name = self.sums, figures.provider
        sums.stream(figures)
        if figures.entered:
            sums.count("telephony_calls", name, figures.reason or "unknown")
            _add(sums, "telephony_call_seconds", name, figures.duration_secs)
            if figures.setup_secs is not None:
                _add(sums, "telephony_call_setup_seconds", name, figures.setup_secs)
        elif not figures.started:
            sums.count("telephony_unstarted", name)

    def outlive(self, before: Iterable[ListenerFigures], after: Iterable[ListenerFigures]) -> None:
        """The listeners of a stream that has ended are gone as well; `before` is how they fared when it ended."""
        self.sums.listeners(after)
        self.sums.listeners(before, sign=-1)

    def happened(self, what: str, provider: str) -> None:
        """One more of a counter by provider."""
        self.sums.count(what, provider)

    def asked(self, provider: str, request: str, result: str) -> None:
        """A carrier's API was asked for something."""
        self.sums.count("telephony_api_requests", provider, request, result)

    def refuse(self, provider: str, reason: str) -> None:
        """Somebody was not let in; `reason` is a constant word."""
        self.sums.count("telephony_auth_failures" if reason in AUTH else "telephony_refusals", provider, reason)


class Standing(NamedTuple):
    """What the process as a whole has to say of itself. `tls_not_after`: seconds since 1970, None without TLS."""

    slots: int
    slots_limit: int
    pending: int
    draining: bool
    tls_not_after: float | None
    reloads: Mapping[str, int] = {}


class Metrics(Collector):
    """One process's metrics, added up when they are asked for."""

    def __init__(
        self,
        totals: Totals,
        providers: Iterable[str],
        streams: Callable[[], Iterable[Figures]],
        standing: Callable[[], Standing],
        watchdog: Watchdog,
    ) -> None:
        self._totals = totals
        self._providers = [*providers]
        self._streams = streams
        self._standing = standing
        self._watchdog = watchdog
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def text(self, accept: str = "") -> tuple[bytes, str]:
        """All metrics, and their content type, in the format that an `Accept` header asks for."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not collect."""
        return []

    def packed(self) -> Packed:
        """All metrics, to be added to those of other processes."""
        packed = self.sums().pack()
        packed.process = process_figures()
        return packed

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        return families(self.sums())

    def sums(self) -> Sums:
        """What the process counts and holds, at this moment."""
        sums, standing, watchdog = self._totals.sums.copy(), self._standing(), self._watchdog
        for name in self._providers:  # a rate needs a zero to begin with
            for counted in (
                "telephony_gap_seconds",
                "telephony_media_stalls",
                "telephony_dropped_seconds",
                "telephony_underruns",
                "telephony_unstarted",
                "telephony_streams_lost",
            ):
                sums.count(counted, name, by=0)
            sums.raise_("telephony_calls_active", name, by=0)
        for figures in self._streams():
            sums.stream(figures)
            sums.live(figures)
        for outcome, count in standing.reloads.items():
            sums.count("telephony_reloads", outcome, by=count)
        sums.raise_("telephony_build_info", __version__, platform.python_version(), by=1)
        sums.raise_("telephony_call_slots", by=standing.slots)
        sums.raise_("telephony_call_slots_limit", by=standing.slots_limit)
        sums.raise_("telephony_connections_pending", by=standing.pending)
        sums.raise_("telephony_draining", by=standing.draining)
        sums.raise_("telephony_event_loop_lag_worst_seconds", by=watchdog.worst())
        for which, share in watchdog.meter.used.items():
            sums.raise_("telephony_load_ratio", which, by=share)
        if standing.tls_not_after is not None:
            sums.raise_("telephony_tls_expiry_timestamp_seconds", by=standing.tls_not_after)
        sums.spread("telephony_event_loop_lag_seconds", by=watchdog.lag)
        sums.count("telephony_event_loop_blocked", by=watchdog.blocked)
        return sums


class Merged(Collector):
    """The metrics of several processes as one."""

    def __init__(self, sums: Sums, process: Mapping[str, float]) -> None:
        self._sums = sums
        self._process = process
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def text(self, accept: str = "") -> tuple[bytes, str]:
        """See `Metrics.text`."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not collect."""
        return []

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        yield from families(self._sums)
        for name, value in self._process.items():
            if name.endswith("_total"):
                yield CounterMetricFamily(name, f"{name}, of all processes", value=value)
            else:
                yield GaugeMetricFamily(name, f"{name}, of all processes", value=value)


def process_figures() -> dict[str, float]:
    """What the system says of this process, by metric."""
    registry = CollectorRegistry()
    metrics = ProcessCollector(registry=registry).collect()
    return {sample.name: sample.value for metric in metrics for sample in metric.samples}


def join_processes(mine: dict[str, float], other: Mapping[str, float]) -> None:
    """Add another process's figures to `mine`."""
    for name, value in other.items():
        join = PROCESS_JOINS.get(name)
        mine[name] = mine.get(name, 0.0) + value if join is None else join(mine.get(name, value), value)


def families(sums: Sums) -> Iterator[Metric]:
    """As Prometheus takes them."""
    for name, family in COUNTERS.items():
        yield _counter(name, family, sums.counts[name])
    for name, spread in HISTOGRAMS.items():
        yield _histogram(name, spread, sums.spreads[name])
    for name, about in GAUGES.items():
        gauge = GaugeMetricFamily(name, about.help, labels=about.labels)
        for labels, value in sums.gauges[name].items():
            gauge.add_metric(labels, value)
        yield gauge


def names() -> set[str]:
    """Every name that a query may use, but for those of the process itself (`process_…`)."""
    spread = {f"{name}_{part}" for name in HISTOGRAMS for part in ("bucket", "count", "sum")}
    return {*GAUGES, *spread, *(f"{name}_total" for name in COUNTERS)}


def _add(sums: Sums, name: str, provider: str, value: float) -> None:
    buckets = Buckets(HISTOGRAMS[name].bounds)
    buckets.add(value)
    sums.spread(name, provider, by=buckets)


def _counter(name: str, family: Family, values: Mapping[Labels, float]) -> Metric:
    counter = CounterMetricFamily(name, family.help, labels=family.labels)
    for labels, value in values.items():
        counter.add_metric(labels, value)
    return counter


def _histogram(name: str, family: Spread, values: Mapping[Labels, Buckets]) -> Metric:
    histogram = HistogramMetricFamily(name, family.help, labels=family.labels)
    for labels, buckets in values.items():
        cumulative, below = [], 0
        for bound, count in zip((*buckets.bounds, float("inf")), buckets.counts, strict=True):
            below += count
            cumulative.append((floatToGoString(bound), below))  # type: ignore[no-untyped-call]
        histogram.add_metric(labels, cumulative, buckets.sum)
    return histogram


def _capped(labels: Labels, known: Mapping[Labels, object]) -> Labels:
    if not labels or labels in known or len(known) < MOST_SERIES:
        return labels
    return (*labels[:-1], "other")
