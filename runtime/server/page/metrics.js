// The Prometheus text of /metrics, and figures from two readings of it.

const SAMPLE = /^(\w[\w:]*)(?:\{(.*)\})? (\S+)/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;

/** One reading of all metrics. */
export class Reading {
  /** time: in milliseconds. */
  constructor(text, time) {
    this.time = time;
    this.samples = new Map();
    for (const line of text.split("\n")) {
      const match = line.startsWith("#") ? null : SAMPLE.exec(line);
      if (!match) continue;
      const [, name, labelText, valueText] = match;
      const pairs = Array.from((labelText ?? "").matchAll(LABEL), (label) => label.slice(1));
      const value = valueText === "+Inf" ? Infinity : Number(valueText);
      if (!this.samples.has(name)) this.samples.set(name, []);
      this.samples.get(name).push({ labels: Object.fromEntries(pairs), value });
    }
  }

  /** The samples of one metric, each with its labels. */
  all(name) {
    return this.samples.get(`llmkit:${name}`) ?? [];
  }

  /** The sum of a metric's samples that have `labels`; undefined when there are none. */
  value(name, labels = {}) {
    const wanted = Object.entries(labels);
    const samples = this.all(name).filter((sample) =>
      wanted.every(([label, value]) => sample.labels[label] === value),
    );
    if (!samples.length) return undefined;
    return samples.reduce((sum, sample) => sum + sample.value, 0);
  }

  /** A counter's increase per second since an earlier reading. */
  rate(name, earlier) {
    const increase = (this.value(name) ?? 0) - (earlier.value(name) ?? 0);
    if (increase < 0) return 0; // the server has restarted
    return increase / ((this.time - earlier.time) / 1000);
  }

  /**
   * A histogram's counts since an earlier reading, or since the start:
   * [[upper bound, observations up to it], ...].
   */
  histogram(name, earlier) {
    const samples = earlier?.all(`${name}_bucket`) ?? [];
    const earlierCounts = new Map(samples.map(({ labels, value }) => [labels.le, value]));
    const buckets = this.all(`${name}_bucket`).map(({ labels, value }) => [
      labels.le === "+Inf" ? Infinity : Number(labels.le),
      value - (earlierCounts.get(labels.le) ?? 0),
    ]);
    // A negative count: the server has restarted since the earlier reading.
    return buckets.some(([, number]) => number < 0) ? this.histogram(name) : buckets;
  }
}

/** Estimate a quantile as Prometheus does: linear within a bucket. NaN without observations. */
export function quantile(buckets, share) {
  const total = buckets.at(-1)?.[1] ?? 0;
  if (!total) return NaN;
  const target = share * total;
  let lowerBound = 0;
  let lowerCount = 0;
  for (const [upperBound, upperCount] of buckets) {
    if (upperCount >= target) {
      if (upperBound === Infinity) return lowerBound;
      const height = upperCount - lowerCount || 1;
      return lowerBound + ((upperBound - lowerBound) * (target - lowerCount)) / height;
    }
    lowerBound = upperBound;
    lowerCount = upperCount;
  }
  return lowerBound;
}
