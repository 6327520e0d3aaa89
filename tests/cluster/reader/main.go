// reader is what runs in the tests' pods: it reads a mounted model from its first byte to its last, and
// prints one line of JSON with the digest of each file and when the first byte had come. Then it waits.
package main

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"io"
	"io/fs"
	"log"
	"os"
	"path/filepath"
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

func (r *report) read(path string) (string, error) {
	file, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer file.Close()
	hash := sha256.New()
	first := make([]byte, 1)
	count, err := file.Read(first)
	if r.FirstByte == 0 && count > 0 {
		r.FirstByte = now()
	}
	hash.Write(first[:count])
	if err == nil {
		_, err = io.Copy(hash, file)
	} else if err == io.EOF {
		err = nil
	}
	return hex.EncodeToString(hash.Sum(nil)), err
}

func main() {
	root := os.Args[1]
	result := report{Started: now(), Digests: map[string]string{}}
	err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		name, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		result.Digests[name], err = result.read(path)
		return err
	})
	if err != nil {
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
	if len(os.Args) > 2 && os.Args[2] == "stay" {
		select {}
	}
}
