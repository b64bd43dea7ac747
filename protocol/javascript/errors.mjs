/** Text in which no URL holds a user and a password: what is logged is read by more people than the command line. */
export const withoutCredentials = (text) => text.replace(/(:\/{1,2})\S*(?:@|%40)/g, "$1***@");

/** An end in words: one line on standard error and an exit code. */
export class Ended extends Error {
  constructor(code, message) {
    super(withoutCredentials(message));
    this.code = code;
  }
}
