/** An end in words: one line on standard error and an exit code. */
export class Ended extends Error {
  constructor(code, message) {
    super(message);
    this.code = code;
  }
}
