// Package ledger has the records of a shim's ledger (ledger.proto): what one incarnation of a shim knows that must outlive
// it. Package shimapi/ledger reads and writes the file.
package ledger
