// The Prometheus text of /metrics, and what can be told from two readings of it.

const SAMPLE = /^(\w[\w:]*)(?:\{(.*)\})? (\S+)/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;

/** One reading of all metrics, at a time in milliseconds. */
export class Reading {
  constructor(text, time) {
    this.time = time;
    this.samples = new Map();
    for (const line of text.split("\n")) {
      const match = line.startsWith("#") ? null : SAMPLE.exec(line);
      if (!match) continue;
      const labels = Object.fromEntries(Array.from((match[2] ?? "").matchAll(LABEL), ([, name, value]) => [name, value]));
      const value = match[3] === "+Inf" ? Infinity : Number(match[3]);
      if (!this.samples.has(match[1])) this.samples.set(match[1], []);
      this.samples.get(match[1]).push({ labels, value });
    }
  }

  /** The samples of one metric, each with its labels. */
  all(name) {
    return this.samples.get(`llmkit:${name}`) ?? [];
  }

  /** A metric's value, summed over its labels; undefined when the server has no such metric. */
  value(name, labels = {}) {
    const fitting = this.all(name).filter((sample) =>
      Object.entries(labels).every(([label, value]) => sample.labels[label] === value),
    );
    return fitting.length ? fitting.reduce((sum, sample) => sum + sample.value, 0) : undefined;
  }

  /** How much a counter gained each second since an earlier reading. */
  rate(name, before) {
    const gained = (this.value(name) ?? 0) - (before.value(name) ?? 0);
    return gained >= 0 ? gained / ((this.time - before.time) / 1000) : 0; // less: the server was started again
  }

  /** What a histogram counted since an earlier reading, or ever: [[upper bound, observations up to it], ...]. */
  histogram(name, before) {
    const earlier = new Map((before?.all(`${name}_bucket`) ?? []).map(({ labels, value }) => [labels.le, value]));
    const buckets = this.all(`${name}_bucket`).map(({ labels, value }) => [
      labels.le === "+Inf" ? Infinity : Number(labels.le),
      value - (earlier.get(labels.le) ?? 0),
    ]);
    return buckets.some(([, number]) => number < 0) ? this.histogram(name) : buckets;
  }
}

/** An estimate of a quantile, as Prometheus makes it: linear within a bucket. NaN without observations. */
export function quantile(buckets, share) {
  const total = buckets.at(-1)?.[1] ?? 0;
  if (!total) return NaN;
  const wanted = share * total;
  let [lower, below] = [0, 0];
  for (const [upper, number] of buckets) {
    if (number >= wanted) {
      return upper === Infinity ? lower : lower + ((upper - lower) * (wanted - below)) / (number - below || 1);
    }
    [lower, below] = [upper, number];
  }
  return lower;
}
