// reader is what runs in the tests' pods: it reads a mounted model from its first byte to its last, and
// prints one line of JSON with the digest of each file and when the first byte had come. Then it waits.
// Without a directory it only waits.
package main

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"io"
	"io/fs"
	"log"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"
)

type report struct {
	Started   float64           `json:"started"`
	FirstByte float64           `json:"first_byte"`
	Finished  float64           `json:"finished"`
	Digests   map[string]string `json:"digests"`
	Writable  bool              `json:"writable"`
}

func now() float64 {
	return float64(time.Now().UnixNano()) / 1e9
}

// digest of a file, in hexadecimal.
func (r *report) digest(path string) (string, error) {
	file, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer file.Close()
	hash := sha256.New()
	if _, err := io.CopyN(hash, file, 1); err == nil && r.FirstByte == 0 {
		r.FirstByte = now()
	}
	_, err = io.Copy(hash, file)
	return hex.EncodeToString(hash.Sum(nil)), err
}

func (r *report) readAll(root string) error {
	return filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		name, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		r.Digests[name], err = r.digest(path)
		return err
	})
}

func main() {
	end := make(chan os.Signal, 1)
	signal.Notify(end, syscall.SIGTERM, syscall.SIGINT)
	if len(os.Args) > 1 {
		root := os.Args[1]
		result := report{Started: now(), Digests: map[string]string{}}
		if err := result.readAll(root); err != nil {
			log.Fatal(err)
		}
		result.Finished = now()
		if created, err := os.Create(filepath.Join(root, "written-by-a-pod")); err == nil {
			created.Close()
			result.Writable = true
		}
		if err := json.NewEncoder(os.Stdout).Encode(result); err != nil {
			log.Fatal(err)
		}
	}
	<-end
}
