// What charts show of a run. However long it trains, there are at most MOST points: the older half is thinned when it gets
// full, so that the newest stay complete.
const MOST = 1600;

export class History {
  /** Columns: the step first, then one for each line. */
  columns: (number | null)[][];

  constructor(private readonly lines: number) {
    this.columns = [];
    this.clear();
  }

  clear(): void {
    this.columns = Array.from({ length: this.lines + 1 }, () => []);
  }

  get length(): number {
    return this.columns[0].length;
  }

  /** Forgets what comes after a step: a run went on from there. */
  since(step: number): void {
    const kept = this.columns[0].findIndex((at) => at !== null && at > step);
    if (kept >= 0) this.columns = this.columns.map((column) => column.slice(0, kept));
  }

  push(step: number, ...values: (number | null)[]): void {
    if (this.length >= MOST) {
      const half = MOST / 2;
      this.columns = this.columns.map((column) => column.filter((_, i) => i >= half || i % 2 === 0));
    }
    this.columns[0].push(step);
    values.forEach((value, i) => this.columns[i + 1].push(value));
  }
}
